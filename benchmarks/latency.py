"""How fast INT8 is against FP32: qdeploy's file and the one that ORT's quantize_static writes by default.

python benchmarks/latency.py [--samples 64] [--repeats 20]
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, redirect_stdout
from functools import partial
from pathlib import Path
from statistics import median

from common import SOURCE, OrtReader, different_images, prepared_model, print_environment, print_table, save_inputs

from qdeploy.backend import Arrays
from qdeploy.building import Making, build
from qdeploy.collect import collect
from qdeploy.model import FloatModel
from qdeploy.outcome import Job
from qdeploy.parity.latency import Latency, measure, speedup
from qdeploy.pipeline import calibration_reader, look_up
from qdeploy.recipe import Recipe, TargetRequest
from qdeploy.samples.source import Sample
from qdeploy.session import SessionRunner

THREADS = (1, 2)
BUDGET_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast INT8 is against FP32.")
    parser.add_argument("--samples", type=int, default=64, help="images to calibrate with")
    parser.add_argument("--repeats", type=int, default=20, help="rounds of five counted runs of each file")
    arguments = parser.parse_args()
    samples = different_images(arguments.samples)
    print_environment()
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as name:
        folder = Path(name)
        model = prepared_model(folder)
        files = {
            "FP32": model.path,
            "INT8, qdeploy": _quantized_by_qdeploy(model, samples, folder),
            "INT8, ORT default": _quantized_by_ort(model, samples, folder),
        }
        print_latency(files, samples[0].inputs, arguments.repeats)


def _quantized_by_qdeploy(model: FloatModel, samples: list[Sample], folder: Path) -> Path:
    """With everything at its default."""
    scratch, bundle = folder / "scratch", folder / "bundle"
    scratch.mkdir()
    bundle.mkdir()
    (job,) = look_up(Recipe(SOURCE, (TargetRequest("ort-cpu", "int8"),)))
    assert isinstance(job, Job)
    statistics = collect(model, samples)
    return build(Making(job, model, statistics, calibration_reader("mse"), scratch), bundle).artifact.path


def _quantized_by_ort(model: FloatModel, samples: list[Sample], folder: Path) -> Path:
    """With everything at its default: signed activations, weights per tensor, ranges from the extremes."""
    from onnxruntime.quantization import quantize_static

    (folder / "inputs").mkdir()
    path = folder / "ort.onnx"
    with redirect_stdout(sys.stderr):
        quantize_static(model.path, path, OrtReader(save_inputs(samples, folder / "inputs")))
    return path


def print_latency(files: Mapping[str, Path], inputs: Arrays, rounds: int) -> None:
    """A table of the files' latencies on the same inputs; one of them is called FP32, the baseline."""
    rows = [row for threads in THREADS for row in _rows(files, inputs, threads, rounds)]
    titles = ("Threads", "File", "p50", "p90", "p99", "Speed-up", "95 % interval", "After another model", "Opening")
    print_table(titles, rows)


def _rows(files: Mapping[str, Path], inputs: Arrays, threads: int, rounds: int) -> list[tuple[str, ...]]:
    with ExitStack() as stack:
        runners, opening = {}, {}
        for name, path in files.items():
            start = time.perf_counter()
            runners[name] = stack.enter_context(SessionRunner(path, threads=threads))
            opening[name] = time.perf_counter() - start
        runs = {name: partial(runner.run, inputs) for name, runner in runners.items()}
        times = measure(runs, rounds=rounds, budget_s=BUDGET_S)
        cold = _by_turns(runs, rounds)
    return [
        (
            f"{threads}",
            name,
            *_cells(times["FP32"], times[name]),
            f"{cold[name]:.2f} ms",
            f"{1e3 * opening[name]:.0f} ms",
        )
        for name in files
    ]


def _cells(baseline: Latency, latency: Latency) -> tuple[str, ...]:
    ratio, (low, high) = speedup(baseline, latency)
    percentiles = (f"{value:.2f} ms" for value in (latency.p50, latency.p90, latency.p99))
    return (*percentiles, f"**{ratio:.2f}×**", f"{low:.2f} to {high:.2f}")


def _by_turns(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds when every run follows one of another model, whose weights then fill the caches."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(each) for name, each in times.items()}


if __name__ == "__main__":
    main()
