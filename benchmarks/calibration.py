"""What calibration costs: time over plain inference and peak memory, ours and ONNX Runtime's own calibrators'.

python benchmarks/calibration.py [--samples 64 500] [--repeats 5]
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

from common import (
    SOURCE,
    OrtReader,
    SavedInputs,
    different_images,
    in_new_process,
    peak_memory_mb,
    prepared_model,
    print_environment,
    print_table,
    save_inputs,
)

from qdeploy.affine import IntegerType
from qdeploy.collect import collect
from qdeploy.model import FloatModel
from qdeploy.samples.source import Sample
from qdeploy.scheme import Scheme
from qdeploy.statistics import Statistics

FEW = 4
"""Samples of a pass that shows the fixed cost: the graph, the session, first runs."""

READERS = ("minmax", "percentile", "entropy", "mse")
ORT_METHODS = ("MinMax", "Entropy", "Percentile")

SETTLE_S = 0.5
"""Before each measurement: the threads of a session with default options spin for a while after a run."""


@dataclass(frozen=True)
class Cost:
    """Of one task in a process of its own."""

    seconds: float
    peak_mb: float


def main() -> None:
    parser = argparse.ArgumentParser(description="What calibration costs.")
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 500], help="numbers of samples")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of measurements for each time ratio")
    arguments = parser.parse_args()
    samples = different_images(max(arguments.samples))
    print_environment()
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as name:
        folder = Path(name)
        model = prepared_model(folder)
        _print_time(model, samples, arguments.samples, arguments.repeats)
        _print_readers(model, samples, folder / "statistics.npz")
        (folder / "inputs").mkdir()
        _print_costs(model, samples, arguments.samples, save_inputs(samples, folder / "inputs"))
        _print_compilation(folder / "numba")


def _print_time(model: FloatModel, samples: list[Sample], counts: Sequence[int], repeats: int) -> None:
    """One calibration pass over plain inference, both on samples in memory, taking turns."""
    collect(model, samples[:2])  # loads or compiles the counting loop
    print_table(time_titles(repeats), (time_cells(model, samples[:count], repeats) for count in counts))


def time_titles(repeats: int) -> tuple[str, ...]:
    """Of the columns that `time_cells` fills."""
    times = ("Plain inference", "qdeploy.collect", f"of {FEW} samples")
    return ("Samples", *times, "Ratio, median", f"of {repeats}", "Ratio of the further samples")


def time_cells(model: FloatModel, samples: list[Sample], repeats: int) -> tuple[str, ...]:
    """A row of the time of calibration over plain inference of the same samples."""
    count = len(samples)
    turns = [_turn(model, samples, index) for index in range(repeats)]
    inferring, collecting, fixed = (median(times) for times in zip(*turns, strict=True))
    ratios = [whole / plain for plain, whole, _ in turns]
    further = [(whole - few) / (plain * (count - FEW) / count) for plain, whole, few in turns]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    times = (f"{inferring:.2f} s", f"{collecting:.2f} s", f"{fixed:.2f} s")
    return (f"{count}", *times, f"**{median(ratios):.2f}**", spread, f"{median(further):.2f}")


def _turn(model: FloatModel, samples: list[Sample], index: int) -> tuple[float, float, float]:
    """Seconds of plain inference, of a whole calibration pass, and of one over few samples; the first two alternate."""
    few = _collection_seconds(model, samples[:FEW])
    if index % 2 == 0:
        return inference_seconds(model, samples), _collection_seconds(model, samples), few
    collecting = _collection_seconds(model, samples)
    return inference_seconds(model, samples), collecting, few


def inference_seconds(model: FloatModel, samples: list[Sample]) -> float:
    """All samples through ONNX Runtime with default options; the session is open and warm before."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(model.path), providers=["CPUExecutionProvider"])
    for sample in samples[:3]:
        session.run(None, dict(sample.inputs))
    time.sleep(SETTLE_S)
    start = time.perf_counter()
    for sample in samples:
        session.run(None, dict(sample.inputs))
    return time.perf_counter() - start


def _collection_seconds(model: FloatModel, samples: list[Sample]) -> float:
    time.sleep(SETTLE_S)
    start = time.perf_counter()
    collect(model, samples)
    return time.perf_counter() - start


def _print_readers(model: FloatModel, samples: list[Sample], path: Path) -> None:
    """All ranges from one statistics file, by each reader."""
    from qdeploy.pipeline import calibration_reader

    collect(model, samples).save(path)
    scheme = Scheme(IntegerType(8, signed=False), symmetric=False)
    rows = []
    for name in READERS:
        reader = calibration_reader(name)
        start = time.perf_counter()
        statistics = Statistics.load(path)
        loaded = time.perf_counter()
        for tensor in statistics.tensors.values():
            reader.range(tensor, scheme)
        done = time.perf_counter()
        rows.append((name, f"{loaded - start:.2f} s", f"{done - loaded:.2f} s"))
    size = f"{len(statistics.tensors)} tensors, {statistics.samples} samples, {path.stat().st_size / 1e3:.0f} kB"
    print_table((f"Reader ({size})", "Loading the file", "Reading all ranges"), rows)


def _print_costs(model: FloatModel, samples: list[Sample], counts: Sequence[int], saved: SavedInputs) -> None:
    """From the float model to the INT8 file, each in a process of its own, samples streamed from files."""
    few = min(counts)
    tasks: list[tuple[str, int, Callable[[FloatModel, SavedInputs], Cost]]] = [
        ("plain inference", few, plain_inference_cost),
        *(("qdeploy: mse, bias correction", count, qdeploy_cost) for count in counts),
        *((f"ORT quantize_static: {method}", few, partial(ort_cost, method=method)) for method in ORT_METHODS),
    ]
    rows = []
    for name, count, task in tasks:
        inferring = inference_seconds(model, samples[:count])
        cost = in_new_process(task, model, replace(saved, count=count))
        ratio = f"{cost.seconds / inferring:.1f}"
        rows.append((name, f"{count}", f"{cost.seconds:.2f} s", ratio, f"{cost.peak_mb:,.0f} MB"))
    print_table(("Calibrate and quantize", "Samples", "Time", "Over plain inference", "Peak memory"), rows)


def plain_inference_cost(model: FloatModel, saved: SavedInputs) -> Cost:
    """What every process that runs the model needs: the libraries, the session, a sample."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(model.path), providers=["CPUExecutionProvider"])
    start = time.perf_counter()
    for inputs in saved:
        session.run(None, dict(inputs))
    return Cost(time.perf_counter() - start, peak_memory_mb())


def qdeploy_cost(model: FloatModel, saved: SavedInputs) -> Cost:
    """Collect, plan, correct the biases, quantize; the libraries are loaded and the loop is compiled before."""
    from qdeploy.outcome import Job
    from qdeploy.pipeline import calibration_reader, look_up
    from qdeploy.plan import plan
    from qdeploy.quantize.static import quantize
    from qdeploy.recipe import Recipe, TargetRequest
    from qdeploy.recover.steps import recover

    (job,) = look_up(Recipe(SOURCE, (TargetRequest("ort-cpu", "int8"),)))
    assert isinstance(job, Job)
    collect(model, [Sample(next(iter(saved)))])
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as folder:
        start = time.perf_counter()
        statistics = collect(model, (Sample(inputs) for inputs in saved))
        drafted = plan(model, statistics, job.contract, calibration_reader("mse"))
        quantize(recover(drafted, statistics, job.steps), Path(folder))
        return Cost(time.perf_counter() - start, peak_memory_mb())


def ort_cost(model: FloatModel, saved: SavedInputs, method: str) -> Cost:
    """ONNX Runtime's own calibrator and quantizer, with weights per channel."""
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    with tempfile.TemporaryDirectory(prefix="qdeploy-") as folder, redirect_stdout(sys.stderr):
        start = time.perf_counter()
        quantize_static(
            model.path,
            Path(folder) / "model.onnx",
            OrtReader(saved),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[method],
        )
        return Cost(time.perf_counter() - start, peak_memory_mb())


def _print_compilation(cache: Path) -> None:
    """What the tables above leave out: the counting loop is compiled once, and then loaded from numba's cache."""
    os.environ["NUMBA_CACHE_DIR"] = str(cache)
    first, second = (in_new_process(counting_loop_seconds) for _ in range(2))
    rows = [("the first time on a machine", f"{first:.1f} s"), ("in each process after that", f"{second:.1f} s")]
    print_table(("Getting the counting loop ready", "Time"), rows)


def counting_loop_seconds() -> float:
    """Until the compiled loop has counted its first tensor; numba's import is included."""
    import numpy as np

    from qdeploy.counting import Tally

    start = time.perf_counter()
    Tally("x", 1, 2).add(np.ones((1, 2, 8), np.float32))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
