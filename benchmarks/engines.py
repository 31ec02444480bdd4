"""TensorRT engines without a GPU: what is built, how long it takes, how large it is, and INT8 accuracy as simulated.

python benchmarks/engines.py [--samples 200]

(The file is not called tensorrt.py: Python would find it in the place of the library.)
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import images, print_environment, print_table
from networks import Network, networks
from zoo import ZOO

from qdeploy.backend import Artifact, Layer
from qdeploy.backends.trt.engine import EngineRunner
from qdeploy.building import Making, build
from qdeploy.collect import collect
from qdeploy.device import cuda_devices
from qdeploy.export import export, load
from qdeploy.model import DimRange, FloatModel, ModelSource, size_of_files
from qdeploy.outcome import Built, Job
from qdeploy.parity.compare import Comparison
from qdeploy.parity.harness import against_float
from qdeploy.parity.metrics import metric_from_name
from qdeploy.pipeline import calibration_reader, look_up
from qdeploy.prepare import prepare
from qdeploy.recipe import Recipe, TargetRequest
from qdeploy.samples.source import Sample
from qdeploy.statistics import Statistics

ARCHITECTURES = ("sm80", "sm86", "sm89", "sm120")
PRECISIONS = ("int8", "fp16", "int8-fp16", "fp32")
RUNS = 200


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
    _print_latency()


def _print_engines() -> None:
    rows = []
    for network in networks(ZOO).values():
        with tempfile.TemporaryDirectory(prefix="qdeploy-") as name:
            folder = Path(name)
            model = network.prepared(folder)
            statistics = collect(model, [Sample(network.sample)], threads=1)
            rows += [_engine_row(network, model, statistics, each, folder / each) for each in PRECISIONS]
    titles = (
        "Network",
        "Precision",
        "Float model",
        "Plan",
        "Build",
        "Built twice",
        "Of one size",
        "Convolutions and products",
    )
    print_table(titles, rows)


def _engine_row(
    network: Network, model: FloatModel, statistics: Statistics, precision: str, folder: Path
) -> tuple[str, ...]:
    artifact = _artifact(network.source, model, statistics, precision, folder)
    given = _given(model, artifact)
    fixed = replace(
        given, dims={name: DimRange(each.typical, each.typical, each.typical) for name, each in model.dims.items()}
    )
    start = time.perf_counter()
    twice = [_lowered(network, given, precision, folder / name) for name in ("once", "again")]
    seconds = (time.perf_counter() - start) / 2
    twice_fixed = [_lowered(network, fixed, precision, folder / name) for name in ("once-fixed", "again-fixed")]
    kinds = Counter(layer.precision for layer in weighted_layers(artifact))
    return (
        network.name,
        precision,
        f"{size_of_files((model.path,)) / 1e6:.1f} MB",
        f"{size_of_files((artifact.path,)) / 1e6:.1f} MB",
        f"{seconds:.1f} s",
        _sameness(*twice),
        _sameness(*twice_fixed),
        ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())),
    )


def _lowered(network: Network, given: FloatModel, precision: str, folder: Path) -> Artifact:
    folder.mkdir()
    job = job_for(network.source, precision)
    return job.backend.lower(given, precision, folder, job.options)


def _sameness(first: Artifact, second: Artifact) -> str:
    """How far two engines of one model are equal."""
    if first.path.read_bytes() == second.path.read_bytes():
        return "every byte"
    return "every layer" if first.layers == second.layers else "no"


def _given(model: FloatModel, artifact: Artifact) -> FloatModel:
    """What an engine was built from, under the float model's ranges."""
    return replace(model, path=artifact.directory / "model.onnx")


def _artifact(source: ModelSource, model: FloatModel, statistics: Statistics, precision: str, folder: Path) -> Artifact:
    return _build(source, model, statistics, precision, folder).artifact


def _build(source: ModelSource, model: FloatModel, statistics: Statistics, precision: str, folder: Path) -> Built:
    return _built(job_for(source, precision), model, statistics, folder)


def _built(job: Job, model: FloatModel, statistics: Statistics, folder: Path) -> Built:
    for part in ("scratch", "bundle"):
        (folder / part).mkdir(parents=True)
    making = Making(job, model, statistics, calibration_reader("mse"), folder / "scratch")
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


def _print_latency() -> None:
    """Milliseconds on the device, where there is one: nothing else is called a latency."""
    if not cuda_devices():
        print("\nNo latency was measured: there is no CUDA device.")
        return
    rows = []
    for network in networks(ZOO).values():
        with tempfile.TemporaryDirectory(prefix="qdeploy-") as name:
            folder = Path(name)
            model = network.prepared(folder)
            statistics = collect(model, [Sample(network.sample)], threads=1)
            for precision in PRECISIONS:
                request = TargetRequest("tensorrt", precision, {})
                (job,) = look_up(Recipe(network.source, (request,)))
                assert isinstance(job, Job)
                artifact = _built(job, model, statistics, folder / precision).artifact
                with EngineRunner(artifact.directory, job.options) as runner:
                    times = np.array(runner.device_times_ms(network.sample, RUNS))
                row = (network.name, precision, *(f"{np.percentile(times, q):.3f} ms" for q in (50, 90)))
                rows.append(row)
    print_table(("Network", "Precision", f"Median of {RUNS} runs, batch 2", "90th percentile"), rows)


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
