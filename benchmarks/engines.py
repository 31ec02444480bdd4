"""TensorRT engines without a GPU: what is built, how long it takes, how large it is, and INT8 accuracy as simulated.

python benchmarks/engines.py [--samples 200]

(The file is not called tensorrt.py: Python would find it in the place of the library.)
"""

import argparse
import os
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import images, print_environment, print_table
from networks import Network, networks
from zoo import ZOO

from qdeploy.backend import Artifact, Layer
from qdeploy.collect import collect
from qdeploy.export import export, load
from qdeploy.model import FloatModel, ModelSource, size_of_files
from qdeploy.outcome import Job
from qdeploy.parity.compare import Comparison
from qdeploy.parity.harness import against_float
from qdeploy.parity.metrics import metric_from_name
from qdeploy.pipeline import Making, build, calibration_reader, look_up
from qdeploy.prepare import prepare
from qdeploy.recipe import Recipe, TargetRequest
from qdeploy.samples.source import Sample
from qdeploy.statistics import Statistics

ARCHITECTURES = ("sm80", "sm86", "sm89", "sm120")
PRECISIONS = ("int8", "fp16", "int8-fp16", "fp32")


def job_for(source: ModelSource, precision: str) -> Job:
    """TensorRT at one precision, for all architectures in one plan."""
    (job,) = look_up(Recipe(source, (TargetRequest("tensorrt", precision, {"arch": ",".join(ARCHITECTURES)}),)))
    if not isinstance(job, Job):
        sys.exit(f"SKIPPED: nothing was measured. {job.reason}")
    return job


def weighted_layers(artifact: Artifact) -> list[Layer]:
    """The layers of convolutions and matrix products."""
    return [layer for layer in artifact.layers if layer.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM")]


def main() -> None:
    parser = argparse.ArgumentParser(description="TensorRT engines without a GPU.")
    parser.add_argument("--samples", type=int, help="most images or sentences of each part; all unless given")
    arguments = parser.parse_args()
    if "QDEPLOY_DATA" not in os.environ:
        sys.exit("SKIPPED: nothing was measured. Set QDEPLOY_DATA to the folder of images and sentences.")
    print_environment()
    _print_engines()
    _print_accuracy(arguments.samples)


def _print_engines() -> None:
    rows = []
    for network in networks(ZOO).values():
        with tempfile.TemporaryDirectory(prefix="qdeploy-") as name:
            folder = Path(name)
            model = network.prepared(folder)
            statistics = collect(model, [Sample(network.sample)], workers=1)
            rows += [_engine_row(network, model, statistics, each, folder / each) for each in PRECISIONS]
    titles = ("Network", "Precision", "Float model", "Plan", "Build", "Twice the same", "Convolutions and products")
    print_table(titles, rows)


def _engine_row(
    network: Network, model: FloatModel, statistics: Statistics, precision: str, folder: Path
) -> tuple[str, ...]:
    job, artifact = job_for(network.source, precision), _artifact(network.source, model, statistics, precision, folder)
    (folder / "again").mkdir()
    given = _given(model, artifact)
    start = time.perf_counter()
    again = job.backend.lower(given, precision, folder / "again", job.options)
    seconds = time.perf_counter() - start
    kinds = Counter(layer.precision for layer in weighted_layers(artifact))
    return (
        network.name,
        precision,
        f"{size_of_files((model.path,)) / 1e6:.1f} MB",
        f"{size_of_files((artifact.path,)) / 1e6:.1f} MB",
        f"{seconds:.1f} s",
        _sameness(artifact.path.read_bytes(), again.path.read_bytes()),
        ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())),
    )


def _sameness(first: bytes, second: bytes) -> str:
    """Whether two plans of one model are equal; the builder numbers its tensors anew each time."""
    if first == second:
        return "every byte"
    unnumbered = (re.sub(rb"mye\d+", b"mye", plan) for plan in (first, second))
    return "but for numbers in names" if len(set(unnumbered)) == 1 else "no"


def _given(model: FloatModel, artifact: Artifact) -> FloatModel:
    """What an engine was built from, under the float model's ranges."""
    return replace(model, path=artifact.directory / "model.onnx")


def _artifact(source: ModelSource, model: FloatModel, statistics: Statistics, precision: str, folder: Path) -> Artifact:
    return _build(source, model, statistics, precision, folder).artifact


def _build(source: ModelSource, model: FloatModel, statistics: Statistics, precision: str, folder: Path) -> Any:
    for part in ("scratch", "bundle"):
        (folder / part).mkdir(parents=True)
    making = Making(job_for(source, precision), model, statistics, calibration_reader("mse"), folder / "scratch")
    return build(making, folder / "bundle")


def _print_accuracy(limit: int | None) -> None:
    """Against FP32: top-1 of EfficientNet-Lite0, Spearman's correlation of MiniLM, both as simulated."""
    from text import _shapes, sentences

    own = _shapes()["of their own lengths"]
    parts = {
        "EfficientNet-Lite0": ("top1", images("calibration", limit), images("evaluation", limit)),
        "MiniLM": ("spearman", sentences("calibration", own, limit), sentences("evaluation", own, limit)),
    }
    rows = []
    for name, (metric, calibration, evaluation) in parts.items():
        source = networks(ZOO)[name].source
        with tempfile.TemporaryDirectory(prefix="qdeploy-") as place:
            folder = Path(place)
            for part in ("exported", "prepared"):
                (folder / part).mkdir()
            model = prepare(export(load(source), evaluation, folder / "exported"), folder / "prepared")
            statistics = collect(model, calibration)
            built = {each: _build(source, model, statistics, each, folder / each) for each in PRECISIONS[:3]}
            subjects = [replace(each.subject(), folder=precision) for precision, each in built.items()]
            compared = against_float(model.path, subjects, evaluation, metric_from_name(metric), lambda: None)
            rows += [(name, *_accuracy_cells(precision, each)) for precision, each in compared.items()]
    titles = ("Network", "Precision", "Metric", "FP32", "Drop", "95 % interval", "Relative drop", "Agreement", "SQNR")
    print_table(titles, rows)


def _accuracy_cells(precision: str, each: Comparison) -> tuple[str, ...]:
    assert each.reference_metric is not None
    assert each.metric is not None
    assert each.drop is not None
    assert each.drop_interval is not None
    low, high = each.drop_interval
    return (
        precision,
        f"{each.metric:.4f}",
        f"{each.reference_metric:.4f}",
        f"{each.drop:z.4f}",
        f"{low:z.4f} to {high:z.4f}",
        f"{each.drop / each.reference_metric:z.2%}",
        "-" if each.agreement is None else f"{each.agreement:.1%}",
        f"{each.sqnr_db:.1f} dB",
    )


if __name__ == "__main__":
    main()
