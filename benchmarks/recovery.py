"""What recovery steps win back where plain quantization fails: weights of 4 bits, and 8 bits with one scale a tensor.

python benchmarks/recovery.py [--samples 200] [--only W4A8]
"""

import argparse
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from common import accuracy_cells, images, percent, prepared_model, print_environment, print_table

import qdeploy
from qdeploy.backend import Runner
from qdeploy.calibration_readers.minmax import MinMax
from qdeploy.calibration_readers.mse import Mse
from qdeploy.collect import collect
from qdeploy.graph import save_graph
from qdeploy.model import FloatModel
from qdeploy.parity.compare import compare
from qdeploy.parity.harness import FLOAT
from qdeploy.parity.metrics import metric_from_name
from qdeploy.plan import QuantPlan, plan
from qdeploy.reader import CalibrationReader
from qdeploy.recover.layer_data import simulate
from qdeploy.recover.recovery import Means, Recovery
from qdeploy.recover.steps import STEPS
from qdeploy.samples.source import SampleSource
from qdeploy.scheme import QuantContract, Scheme
from qdeploy.session import SessionRunner
from qdeploy.statistics import Statistics

Steps = tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """One way to quantize, and the steps to try under it."""

    contract: QuantContract
    reader: CalibrationReader
    steps: list[Steps]


def settings() -> dict[str, Setting]:
    rules = qdeploy.contract("ort-cpu", precision="int8")
    return {
        "W4A8, per-channel, mse": Setting(_with_four_bits(rules), Mse(), _after("clipping")),
        "W8A8, per-tensor, minmax": Setting(rules.with_per_tensor_weights(), MinMax(), _after("equalization")),
    }


def _after(first: str) -> list[Steps]:
    """The ways to round and to correct biases, alone and after another step."""
    alone: list[Steps] = [(), ("bias-correction",), ("bias-correction-empirical",), ("adaround",)]
    return [*alone, (first,), (first, "bias-correction"), (first, "adaround")]


def main() -> None:
    parser = argparse.ArgumentParser(description="What recovery steps win back.")
    parser.add_argument("--samples", type=int, help="most images of each part; all unless given")
    parser.add_argument("--only", default="", help="settings whose name holds this text")
    arguments = parser.parse_args()
    calibration, evaluation = images("calibration", arguments.samples), images("evaluation", arguments.samples)
    print_environment()
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as name:
        folder = Path(name)
        model = prepared_model(folder)
        statistics = collect(model, calibration)
        for title, setting in settings().items():
            if arguments.only in title:
                print(f"## {title}\n")
                _measure(model, setting, statistics, (calibration, evaluation), Path(tempfile.mkdtemp(dir=folder)))


def _measure(
    model: FloatModel,
    setting: Setting,
    statistics: Statistics,
    samples: tuple[SampleSource, SampleSource],
    folder: Path,
) -> None:
    calibration, evaluation = samples
    drafted = plan(model, statistics, setting.contract, setting.reader)
    means = Means(calibration, setting.reader, (), folder)
    taken: dict[Steps, tuple[Recovery, float]] = {(): (Recovery(drafted, statistics, means), 0.0)}
    for steps in setting.steps:
        _take(steps, taken)
    with ExitStack() as stack:
        runners: dict[str, Runner] = {FLOAT: stack.enter_context(SessionRunner(model.path, graph_level="disable"))}
        for steps in setting.steps:
            if steps in taken:
                runner = _simulated(taken[steps][0].plan, folder / f"{len(runners)}.onnx")
                runners[" + ".join(steps) or "none"] = stack.enter_context(runner)
        pairs = [(FLOAT, each) for each in runners if each != FLOAT]
        compared = compare(runners, pairs, evaluation, metric_from_name("top1"))
    first = next(iter(compared.values()))
    titles = ("Recovery", "top-1", "Drop, points", "95 % interval", "Agreement", "SQNR", "CPU time of the steps")
    print(f"FP32: {percent(first.reference_metric)} on {first.samples} images; {statistics.samples} to calibrate.\n")
    seconds = {" + ".join(steps) or "none": time for steps, (_, time) in taken.items()}
    rows = ((each, *accuracy_cells(comparison), f"{seconds[each]:.0f} s") for (_, each), comparison in compared.items())
    print_table(titles, rows)


def _take(steps: Steps, taken: dict[Steps, tuple[Recovery, float]]) -> None:
    """Take steps, the first of them only once for all that begin alike; those that do not exist are left out."""
    if steps in taken or not set(steps) <= set(STEPS):
        return
    _take(steps[:-1], taken)
    before, seconds = taken[steps[:-1]]
    began = time.process_time()  # what else runs on the machine does not count
    after = STEPS[steps[-1]](before)
    taken[steps] = after, seconds + time.process_time() - began


def _simulated(recovered: QuantPlan, path: Path) -> SessionRunner:
    save_graph(simulate(recovered), path)
    return SessionRunner(path, graph_level="disable")


def _with_four_bits(contract: QuantContract) -> QuantContract:
    """The contract with weights of 4 bits: those of signed, narrow integers."""

    def narrowed(scheme: Scheme | None) -> Scheme | None:
        weight = scheme is not None and scheme.integer.narrow
        return replace(scheme, integer=replace(scheme.integer, bits=4)) if scheme and weight else scheme

    rules = (replace(r, inputs={i: narrowed(s) for i, s in r.inputs.items()}) for r in contract.rules)
    return replace(contract, precision="W4A8", rules=tuple(rules))


if __name__ == "__main__":
    main()
