"""What granularity, calibration reader and bias correction are worth: INT8 against FP32 on labelled images.

python benchmarks/accuracy.py [--samples 200]
"""

import argparse
import tempfile
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Literal

from common import SOURCE, accuracy_cells, images, percent, prepared_model, print_environment, print_table

from qdeploy.backend import Runner
from qdeploy.building import Making, build
from qdeploy.collect import collect
from qdeploy.model import FloatModel
from qdeploy.outcome import Job
from qdeploy.parity.compare import compare
from qdeploy.parity.harness import FLOAT
from qdeploy.parity.metrics import metric_from_name
from qdeploy.pipeline import calibration_reader, look_up
from qdeploy.recipe import Recipe, TargetRequest
from qdeploy.session import SessionRunner
from qdeploy.statistics import Statistics

Granularity = Literal["per-tensor", "per-channel"]

GRANULARITIES: tuple[Granularity, ...] = ("per-tensor", "per-channel")
READERS = ("minmax", "entropy", "percentile", "percentile:99.999", "mse")
RECOVERY = ("none", "bias-correction")


def main() -> None:
    parser = argparse.ArgumentParser(description="What granularity, reader and bias correction are worth.")
    parser.add_argument("--samples", type=int, help="most images of each part; all unless given")
    arguments = parser.parse_args()
    calibration, evaluation = images("calibration", arguments.samples), images("evaluation", arguments.samples)
    print_environment()
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as name, ExitStack() as stack:
        folder = Path(name)
        model = prepared_model(folder)
        statistics = collect(model, calibration)
        runners: dict[str, Runner] = {FLOAT: stack.enter_context(SessionRunner(model.path, graph_level="disable"))}
        for granularity, reader, step in product(GRANULARITIES, READERS, RECOVERY):
            runner = _built(model, statistics, granularity, reader, step, folder)
            runners[f"{granularity} | {reader} | {step}"] = stack.enter_context(runner)
        pairs = [(FLOAT, each) for each in runners if each != FLOAT]
        compared = compare(runners, pairs, evaluation, metric_from_name("top1"))
    first = next(iter(compared.values()))
    titles = ("Weights", "Reader", "Recovery", "top-1", "Drop, points", "95 % interval", "Agreement", "SQNR")
    print(f"FP32: {percent(first.reference_metric)} on {first.samples} images; {statistics.samples} to calibrate.\n")
    print_table(titles, ((each, *accuracy_cells(comparison)) for (_, each), comparison in compared.items()))


def _built(
    model: FloatModel, statistics: Statistics, granularity: Granularity, reader: str, step: str, folder: Path
) -> Runner:
    """The INT8 model as the pipeline builds it, ready to be entered."""
    target = TargetRequest("ort-cpu", "int8")
    (job,) = look_up(Recipe(SOURCE, (target,), granularity=granularity, recover=(step,)))
    assert isinstance(job, Job)
    place = folder / granularity / reader.replace(":", "-") / step
    scratch, bundle = place / "scratch", place / "bundle"
    scratch.mkdir(parents=True)
    bundle.mkdir()
    return build(Making(job, model, statistics, calibration_reader(reader), scratch), bundle).subject().runner


if __name__ == "__main__":
    main()
