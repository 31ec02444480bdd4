"""The measurements of one run: every target against FP32, against its own QDQ graph, and for speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from qdeploy.backend import Arrays, Runner
from qdeploy.parity.compare import Comparison, SampleLike, compare
from qdeploy.parity.latency import Latency, measure
from qdeploy.parity.metrics import Metric
from qdeploy.parity.verdict import Stray
from qdeploy.samples.states import Carrying, States
from qdeploy.session import SessionRunner

FLOAT = "float"
EAGER = "eager"
QDQ = "qdq"

EAGER_SAMPLES = 32
STRAY_SAMPLES = 8
LATENCY_BUDGET_S = 10.0
NO_STATES = States({}, ())


@dataclass(frozen=True)
class Subject:
    """A target to be measured.

    Attributes:
        folder: Its name.
        runner: Of the artifact, not yet entered.
        baseline: Of FP32 on the same runtime and device, not yet entered; None to leave speed unmeasured.
        qdq: Its own QDQ graph, or None if it is not quantized.
    """

    folder: str
    runner: Runner
    baseline: Runner | None
    qdq: Path | None


def as_written(model: Path) -> Runner:
    """Runs an ONNX file on ORT CPU without graph rewrites: the reference of numerics."""
    return SessionRunner(model, graph_level="disable")


def against_float(
    float_model: Path,
    subjects: Sequence[Subject],
    samples: Iterable[SampleLike],
    metric: Metric | None,
    on_sample: Callable[[], None],
    states: States = NO_STATES,
) -> dict[str, Comparison]:
    """Each target against FP32 on every sample, by folder. FP32 runs once a sample, without graph rewrites.

    Each model carries its own states from sample to sample, so that what quantization does to them adds up as it will
    where the model is used.
    """
    runners: dict[str, Runner] = {FLOAT: as_written(float_model)}
    runners |= {subject.folder: subject.runner for subject in subjects}
    with ExitStack() as stack:
        runners = {name: stack.enter_context(Carrying(runner, states)) for name, runner in runners.items()}
        pairs = [(FLOAT, subject.folder) for subject in subjects]
        compared = compare(runners, pairs or [(FLOAT, FLOAT)], samples, metric, on_sample)
        return {folder: comparison for (_, folder), comparison in compared.items()}


def against_eager(float_model: Path, eager: Runner, samples: Iterable[SampleLike]) -> Comparison:
    """The FP32 ONNX model against the module it was exported from, on the first samples."""
    with eager, as_written(float_model) as onnx:
        compared = compare({EAGER: eager, FLOAT: onnx}, [(EAGER, FLOAT)], islice(samples, EAGER_SAMPLES), None)
        return compared[EAGER, FLOAT]


def stray(float_model: Path, subject: Subject, samples: Iterable[SampleLike]) -> Stray | None:
    """How far a target is from its own QDQ graph run as written, on the first samples; None if it is not quantized."""
    if subject.qdq is None:
        return None
    with ExitStack() as stack:
        runners: dict[str, Runner] = {
            FLOAT: stack.enter_context(as_written(float_model)),
            QDQ: stack.enter_context(as_written(subject.qdq)),
            subject.folder: stack.enter_context(subject.runner),
        }
        own, quantization = (QDQ, subject.folder), (FLOAT, QDQ)
        compared = compare(runners, [own, quantization], islice(samples, STRAY_SAMPLES), None)
        return Stray(compared[own].max_steps({}), compared[own].sqnr_db, compared[quantization].sqnr_db)


def latency(subject: Subject, sample: SampleLike) -> tuple[Latency, Latency] | None:
    """Latency of a target and of its FP32 baseline on one sample, side by side; None without a baseline."""
    if subject.baseline is None:
        return None
    times = latencies({FLOAT: subject.baseline, subject.folder: subject.runner}, sample.inputs)
    return times[subject.folder], times[FLOAT]


def latencies(runners: Mapping[str, Runner], inputs: Arrays) -> dict[str, Latency]:
    """Latency of each runner on the same inputs, side by side."""
    with ExitStack() as stack:
        entered = {name: stack.enter_context(runner) for name, runner in runners.items()}
        runs = {name: partial(runner.run, inputs) for name, runner in entered.items()}
        return measure(runs, budget_s=LATENCY_BUDGET_S)


@contextmanager
def side_by_side(float_model: Path, subjects: Sequence[Subject]) -> Iterator[Callable[[Arrays], dict[str, Arrays]]]:
    """A function from model inputs to what FP32 and every target give for them, by folder."""
    with ExitStack() as stack:
        runners: dict[str, Runner] = {FLOAT: stack.enter_context(as_written(float_model))}
        runners |= {subject.folder: stack.enter_context(subject.runner) for subject in subjects}
        yield lambda inputs: {name: runner.run(inputs) for name, runner in runners.items()}
