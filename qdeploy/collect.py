"""FloatModel × samples → Statistics: one pass, in bounded memory, whatever the number of samples.

Samples run side by side, each on one thread of one shared session, and are counted into the same tallies by the
thread that ran them: counts and fixed-point sums are exact, so the order does not matter. Workers, processes or
machines, each count a share of the samples in the same way, and what they counted is added.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import reduce
from queue import SimpleQueue
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.backend import Arrays, input_arrays
from qdeploy.counting import Tally
from qdeploy.errors import InputError
from qdeploy.graph import load_graph, observed_tensors
from qdeploy.model import FloatModel
from qdeploy.observing import open_observed
from qdeploy.samples.shares import Share, interleaved, require_same
from qdeploy.samples.source import Sample, SampleSource
from qdeploy.samples.warnings import practice_warnings, sample_digest
from qdeploy.statistics import Statistics, TensorStatistics, values_of
from qdeploy.workers import PackedModel, Workers

if TYPE_CHECKING:
    import onnxruntime

LAST_PART = 0.1
GROWTH = 0.05
"""A range that widens by more than 5 % over the last tenth of the samples has not settled."""


def collect(
    model: FloatModel,
    samples: Iterable[Sample],
    *,
    threads: int = 0,
    on_sample: Callable[[], None] = lambda: None,
) -> Statistics:
    """Run every sample through the model and count the values of every observed tensor.

    Args:
        model: A prepared model.
        samples: Checked against the model's inputs; iterated once.
        threads: Samples that run side by side; 0 for one a core. The result does not depend on it.
        on_sample: Called after each sample.

    Raises:
        InputError: There are no samples, or the model fails on one of them.
    """
    return _statistics(model, [_count(model, samples, threads or os.cpu_count() or 1, on_sample)])


def collect_shared(
    model: FloatModel,
    source: Callable[[FloatModel], SampleSource],
    workers: Workers,
    on_sample: Callable[[], None] = lambda: None,
) -> Statistics:
    """As `collect`, to the same bits, with the samples shared among workers.

    Args:
        model: A prepared model.
        source: Opens the samples; called by every worker, with the model where it lies for that worker.
        workers: Each opens the samples, and takes every one of them in turn.
        on_sample: Called after each sample.

    Raises:
        InputError: There are no samples, they differ from pass to pass, or the model fails on one of them.
        UnavailableError: Workers died again and again.
    """
    task = _Counting(PackedModel.of(model, workers), source, workers.count, workers.threads)
    counted, seen = zip(*workers.run(task, on_sample), strict=True)
    require_same(seen)
    return _statistics(model, counted)


_Pass = tuple[str, list[int], NDArray[np.int32]]
"""One sample's digest, its classes, and the keys of each tensor's extremes, int32 [tensors, 2]."""


@dataclass(frozen=True)
class _Counted:
    """What was counted of some of the samples.

    Attributes:
        tensors: By name; none if there were no samples.
        passes: In the samples' order.
    """

    tensors: Mapping[str, TensorStatistics]
    passes: tuple[_Pass, ...]


@dataclass(frozen=True)
class _Counting:
    """The task of a worker: of `shares` samples that follow one another, to count one; and what it has seen of all."""

    model: PackedModel
    source: Callable[[FloatModel], SampleSource]
    shares: int
    threads: int

    def __call__(self, share: int, on_sample: Callable[[], None]) -> tuple[_Counted, str]:
        with self.model.unpacked() as model:
            own = Share(self.source(model), share, self.shares)
            return _count(model, own, self.threads, on_sample), own.seen


def _statistics(model: FloatModel, shares: Sequence[_Counted]) -> Statistics:
    """What all shares come to."""
    passes = [*interleaved([share.passes for share in shares])]
    if not passes:
        raise InputError("There are no calibration samples.", "Give a source that yields at least one.")
    counted = [share.tensors for share in shares if share.passes]
    tensors = {name: reduce(TensorStatistics.merge, [each[name] for each in counted]) for name in counted[0]}
    digests = [digest for digest, _, _ in passes]
    labels = [label for _, labels, _ in passes for label in labels]
    growth = _growth_warning(np.stack([keys for _, _, keys in passes]))
    notes = (*practice_warnings(digests, labels), *growth, *_non_finite_warnings(tensors))
    return Statistics(model.digest, tuple(sorted(digests)), tensors, notes)


def _count(model: FloatModel, samples: Iterable[Sample], threads: int, on_sample: Callable[[], None]) -> _Counted:
    """Count all of these samples, so many side by side."""
    graph = load_graph(model.path)
    axes = observed_tensors(graph)
    session, observed = open_observed(model, graph, axes)
    idle: SimpleQueue[_Thread] = SimpleQueue()
    tallies = _Tallies(axes, {each.name: each.block for each in observed})
    for _ in range(threads):
        idle.put(_Thread(session, [each.name for each in observed], tallies))
    passes = tuple(_run(samples, idle, threads, on_sample))
    return _Counted(tallies.statistics(), passes)


def _run(
    samples: Iterable[Sample], idle: SimpleQueue[_Thread], threads: int, on_sample: Callable[[], None]
) -> Iterator[_Pass]:
    """What each sample left, in the samples' order; only a few samples are in flight at a time."""

    def task(thread: _Thread, sample: Sample) -> _Pass:
        try:
            return thread.run(sample)
        finally:
            idle.put(thread)

    with ThreadPoolExecutor(threads) as pool:
        futures: list[Future[_Pass]] = []
        running: set[Future[_Pass]] = set()
        for sample in samples:
            if len(running) == threads:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    on_sample()
            futures.append(pool.submit(task, idle.get(), sample))
            running.add(futures[-1])
        for future in running:
            future.result()
            on_sample()
        yield from (future.result() for future in futures)


class _Tallies:
    """Of all observed tensors, shared by the threads, of which one at a time counts the same tensor."""

    def __init__(self, axes: Mapping[str, int | None], blocks: Mapping[str, int]) -> None:
        self._axes = axes
        self._blocks = blocks
        self._locks = {name: Lock() for name in axes}
        self._tallies: dict[str, Tally] = {}

    def add(self, arrays: Arrays) -> NDArray[np.int32]:
        """Count one sample's tensors; the keys of each one's smallest and largest finite value, int32 [tensors, 2]."""
        keys = np.zeros((len(self._axes), 2), np.int32)
        for place, name in enumerate(self._axes):
            with self._locks[name]:
                keys[place] = self._tally(name, arrays[name]).add(arrays[name])
        return keys

    def _tally(self, name: str, array: NDArray[Any]) -> Tally:
        if name not in self._tallies:
            axis = self._axes[name] if array.ndim else None
            channels = 1 if axis is None else array.shape[axis]
            self._tallies[name] = Tally(name, axis, channels, self._blocks.get(name, 1))
        return self._tallies[name]

    def statistics(self) -> dict[str, TensorStatistics]:
        """What was counted so far."""
        return {name: self._tallies[name].statistics() for name in self._axes if name in self._tallies}


class _Thread:
    """Runs samples through the shared session, into the shared tallies."""

    def __init__(self, session: onnxruntime.InferenceSession, observed: Sequence[str], tallies: _Tallies) -> None:
        self._session = session
        self._observed = observed
        self._tallies = tallies
        self._outputs = [output.name for output in session.get_outputs()]
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._shapes_decide = True
        self._buffers: list[NDArray[Any]] = []
        self._binding: onnxruntime.IOBinding | None = None

    def run(self, sample: Sample) -> _Pass:
        inputs = input_arrays(sample.inputs)
        try:
            observed = self._observe(inputs)
        except Exception as error:  # ORT raises a different class for each of its status codes
            raise InputError(f"The model fails on {sample.origin}: {str(error).strip()}") from error
        keys = self._tallies.add(inputs | dict(zip(self._observed, observed, strict=True)))
        return sample_digest(sample.inputs), _classes(sample.labels), keys

    def _observe(self, inputs: Arrays) -> list[NDArray[Any]]:
        """The observed outputs. The arrays of one run are written again by the next of the same input shapes.

        Fresh arrays would cost a third of the pass: their pages must be mapped and zeroed each time.
        """
        import onnxruntime as ort

        shapes = {name: array.shape for name, array in inputs.items()}
        if shapes == self._shapes and self._shapes_decide:
            if self._binding is None:
                self._binding = self._session.io_binding()
                for name, buffer in zip(self._outputs, self._buffers, strict=True):
                    self._binding.bind_output(name, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
            for name, array in inputs.items():
                self._binding.bind_cpu_input(name, array)
            quietly = ort.RunOptions()
            quietly.log_severity_level = 4
            try:
                self._session.run_with_iobinding(self._binding, quietly)
            except Exception:  # noqa: BLE001 - of whatever class; the plain run below raises what is a fault
                self._shapes_decide = False  # an output's shape depends on the values, too
            else:
                return self._buffers
        self._buffers = self._session.run(None, dict(inputs))
        self._shapes = shapes
        self._binding = None
        return self._buffers


def _classes(labels: NDArray[Any] | None) -> list[int]:
    """Labels that stand for classes; real numbers stand for none."""
    return labels.reshape(-1).tolist() if labels is not None and labels.dtype.kind in "iu" else []


def _growth_warning(keys: NDArray[np.int32]) -> tuple[str, ...]:
    """Whether ranges still widened at the end of the pass; keys of each sample's extremes are [samples, tensors, 2]."""
    samples, tensors, _ = keys.shape
    early = samples - max(1, round(LAST_PART * samples))
    if early < 1:
        return ()
    before, after = _widths(keys[:early]), _widths(keys)
    growing = int(np.sum(after > before * (1 + GROWTH)))
    if growing == 0:
        return ()
    part = f"the last {samples - early} of {samples} samples"
    return (f"The ranges of {growing} of {tensors} tensors still grew by more than 5 % over {part}: use more.",)


def _widths(keys: NDArray[np.int32]) -> NDArray[np.float64]:
    """Of the tensors' ranges over all of these samples, [tensors]; NaN where no value was finite."""
    low, high = (values_of(part).astype(np.float64) for part in (keys[..., 0].min(axis=0), keys[..., 1].max(axis=0)))
    return high - low  # masks reach to the end of float32


def _non_finite_warnings(tensors: Mapping[str, TensorStatistics]) -> tuple[str, ...]:
    counts = {name: tensor.non_finite for name, tensor in tensors.items() if tensor.non_finite}
    return tuple(f"{n} values of {name!r} were NaN or infinite; they count for no range." for name, n in counts.items())
