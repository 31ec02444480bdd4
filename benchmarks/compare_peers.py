"""qdeploy beside the field's other quantizers, on the same models and samples, each in an environment of its own.

python benchmarks/compare_peers.py [--samples 200] [--environments FOLDER] [--model efficientnet minilm]

The first run makes the environments with pip, which needs some gigabytes. A peer that cannot be installed, or that
fails, has a row that says so.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from common import images, percent, prepared_model, print_environment, print_table
from text import minilm, sentences

from qdeploy.backend import Arrays
from qdeploy.model import FloatModel
from qdeploy.parity.compare import Comparison, compare
from qdeploy.parity.harness import FLOAT
from qdeploy.parity.latency import measure, speedup
from qdeploy.parity.metrics import metric_from_name
from qdeploy.samples.source import Sample, SampleSource
from qdeploy.session import SessionRunner

SCRIPTS = Path(__file__).parent / "peers"
LIMIT_S = 1800
ROUNDS = 20
BUDGET_S = 120.0


@dataclass(frozen=True)
class Peer:
    """A quantizer.

    Attributes:
        name: For the table.
        script: In the folder `peers`.
        requirements: What its environment holds; none for this very environment.
        methods: Names that the script knows, by the model that they are for.
    """

    name: str
    script: str
    requirements: tuple[str, ...]
    methods: Mapping[str, tuple[str, ...]]


PEERS = (
    Peer("qdeploy", "qdeploy_tools.py", (), {"efficientnet": ("int8",), "minilm": ("int8", "int8-dynamic")}),
    Peer(
        "ONNX Runtime 1.32",
        "onnxruntime_tools.py",
        (),
        {"efficientnet": ("default", "advised"), "minilm": ("default", "advised", "dynamic")},
    ),
    Peer(
        "NNCF 3.4",
        "nncf_tools.py",
        ("nncf==3.4.0", "onnx==1.23.2", "onnxruntime==1.32.0"),
        {"efficientnet": ("default", "accurate"), "minilm": ("transformer",)},
    ),
    Peer(
        "AMD Quark 0.13",
        "quark_tools.py",
        ("amd-quark==0.13", "onnxruntime==1.32.0", "torch==2.13.0"),
        {"efficientnet": ("U8S8_AAWS", "A8W8", "XINT8"), "minilm": ("U8S8_AAWS",)},
    ),
    Peer(
        "AIMET 2.42", "aimet_tools.py", ("aimet-onnx==2.42.0",), {"efficientnet": ("default",), "minilm": ("default",)}
    ),
)


@dataclass(frozen=True)
class Task:
    """A model, the samples to calibrate with, and those to compare on."""

    model: FloatModel
    calibration: Sequence[Sample]
    evaluation: SampleSource
    metric: str
    timed: Arrays


@dataclass(frozen=True)
class Made:
    """What a peer's process left; `failure` is what it said last if it left no model."""

    path: Path
    seconds: float = 0.0
    peak_mb: float = 0.0
    failure: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description="qdeploy beside the field's other quantizers.")
    parser.add_argument("--samples", type=int, default=200, help="most samples to calibrate with")
    parser.add_argument("--environments", type=Path, default=Path("out/peers"), help="where the peers are installed")
    parser.add_argument("--model", nargs="+", choices=TASKS, default=list(TASKS), help="which models")
    arguments = parser.parse_args()
    print_environment()
    pythons = {peer.name: _python(peer, arguments.environments) for peer in PEERS}
    for name in arguments.model:
        with tempfile.TemporaryDirectory(prefix="qdeploy-") as folder:
            _compare(name, TASKS[name](Path(folder), arguments.samples), pythons, Path(folder))


def _python(peer: Peer, environments: Path) -> Path:
    """The interpreter of the peer's environment, which is made if there is none."""
    if not peer.requirements:
        return Path(sys.executable)
    place = (environments / peer.script.removesuffix("_tools.py")).absolute()
    python = place / "bin/python"
    if not python.exists():
        venv.create(place, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *peer.requirements], check=False)
    return python


def _efficientnet(folder: Path, samples: int) -> Task:
    calibration = list(islice(images("calibration"), samples))
    evaluation = images("evaluation")
    return Task(prepared_model(folder), calibration, evaluation, "top1", calibration[0].inputs)


def _minilm(folder: Path, samples: int) -> Task:
    model, tokenization = minilm(folder)
    calibration = list(sentences("calibration", tokenization, samples))
    evaluation = sentences("evaluation", tokenization)
    longest = max(calibration, key=lambda sample: sample.inputs["input_ids"].size)
    return Task(model, calibration, evaluation, "spearman", longest.inputs)


TASKS = {"efficientnet": _efficientnet, "minilm": _minilm}


def _compare(name: str, task: Task, pythons: Mapping[str, Path], folder: Path) -> None:
    inputs = folder / "inputs"
    inputs.mkdir()
    for index, sample in enumerate(task.calibration):
        np.savez(inputs / f"{index:05}.npz", **sample.inputs)
    made = {
        f"{peer.name}, {method}": _made(peer, method, pythons[peer.name], task.model.path, inputs, folder)
        for peer in PEERS
        for method in peer.methods[name]
    }
    titles = ("Quantizer", "Time", "Peak memory", task.metric, "Agreement", "SQNR", "Speed, 1 thread", "2 threads")
    print(f"{name}: {len(task.calibration)} samples to calibrate with.\n")
    print_table(titles, _rows(made, task))


def _made(peer: Peer, method: str, python: Path, model: Path, inputs: Path, folder: Path) -> Made:
    output = folder / f"{peer.script}.{method}.onnx"
    command = [python, SCRIPTS / peer.script, method, model, inputs, output]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return Made(output, failure=f"not done after {LIMIT_S} s")
    if done.returncode != 0 or not output.exists():
        lines = (done.stderr or done.stdout).strip().splitlines()
        return Made(output, failure=lines[-1] if lines else f"exit code {done.returncode}")
    return Made(output, **json.loads(done.stdout.strip().splitlines()[-1]))


def _rows(made: Mapping[str, Made], task: Task) -> Iterator[tuple[str, ...]]:
    usable = {name: each.path for name, each in made.items() if not each.failure}
    with ExitStack() as stack:
        runners = {name: stack.enter_context(SessionRunner(path)) for name, path in usable.items()}
        runners[FLOAT] = stack.enter_context(SessionRunner(task.model.path, graph_level="disable"))
        metric = metric_from_name(task.metric)
        compared = compare(runners, [(FLOAT, name) for name in usable], task.evaluation, metric)
    speeds = {threads: _speeds({FLOAT: task.model.path, **usable}, task.timed, threads) for threads in (1, 2)}
    reference = next(iter(compared.values())).reference_metric
    yield ("FP32", "", "", percent(reference), "", "", "1.00×", "1.00×")
    for name, each in made.items():
        if each.failure:
            yield (name, each.failure.replace("|", "/")[:100], *[""] * 6)
        else:
            cost = (f"{each.seconds:.1f} s", f"{each.peak_mb:,.0f} MB")
            yield (name, *cost, *_accuracy(compared[FLOAT, name]), *(f"{speeds[t][name]:.2f}×" for t in (1, 2)))


def _accuracy(comparison: Comparison) -> tuple[str, ...]:
    return (percent(comparison.metric), percent(comparison.agreement), f"{comparison.sqnr_db:.1f} dB")


def _speeds(files: Mapping[str, Path], inputs: Arrays, threads: int) -> dict[str, float]:
    """Of each file on ONNX Runtime, over FP32's in interleaved runs."""
    with ExitStack() as stack:
        runners = {n: stack.enter_context(SessionRunner(path, threads=threads)) for n, path in files.items()}
        times = measure({n: partial(r.run, inputs) for n, r in runners.items()}, rounds=ROUNDS, budget_s=BUDGET_S)
    return {name: speedup(times[FLOAT], latency)[0] for name, latency in times.items()}


if __name__ == "__main__":
    main()
