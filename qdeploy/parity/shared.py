"""Targets against FP32 with the samples shared among workers, to the bits of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from qdeploy.backend import Artifact, Backend, Evidence, Runner
from qdeploy.errors import UnavailableError
from qdeploy.model import FloatModel
from qdeploy.parity.compare import Comparison, Observation, observations, summed_up
from qdeploy.parity.harness import FLOAT, as_written
from qdeploy.parity.metrics import Metric
from qdeploy.samples.shares import Share, interleaved, require_same
from qdeploy.samples.source import SampleSource
from qdeploy.session import threads_each
from qdeploy.workers import Luggage, PackedModel, Workers


@dataclass(frozen=True)
class PackedTarget:
    """A target's artifact on its way to workers.

    Attributes:
        backend: Whose it is.
        artifact: Where it lies here.
        options: The backend's.
        evidence: How it runs here, and must run there.
        luggage: The artifact's folder.
    """

    backend: Backend
    artifact: Artifact
    options: Any
    evidence: Evidence
    luggage: Luggage

    @classmethod
    def of(cls, backend: Backend, artifact: Artifact, options: Any, workers: Workers) -> PackedTarget:
        """The target as these workers need it."""
        files = (path for path in artifact.directory.rglob("*") if path.is_file())
        luggage = Luggage.of(artifact.directory, files, workers)
        return cls(backend, artifact, options, backend.open(artifact, options).evidence, luggage)

    @contextmanager
    def runner(self) -> Iterator[Runner]:
        """Its runner, entered.

        Raises:
            UnavailableError: It does not run here as it does where it was packed.
        """
        with self.luggage.unpacked() as folder:
            runner = self.backend.open(replace(self.artifact, directory=folder), self.options)
            if runner.evidence is not self.evidence:
                what = f"{self.backend.name} is {self.evidence} on this machine, but {runner.evidence} by a worker."
                raise UnavailableError(what, "Do without workers, or give them the same device and packages.")
            with runner:
                yield runner


def against_float_shared(
    float_model: FloatModel,
    targets: Mapping[str, PackedTarget],
    source: Callable[[], SampleSource],
    metric: Callable[[], Metric | None],
    workers: Workers,
    on_sample: Callable[[], None],
) -> dict[str, Comparison]:
    """As `harness.against_float`, to the same bits, for a model without states.

    Args:
        float_model: Prepared.
        targets: By folder.
        source: Opens the samples; called by every worker.
        metric: Makes the metric; called by every worker.
        workers: Each opens the samples, and takes every one of them in turn.
        on_sample: Called after each sample.

    Raises:
        InputError: As `compare`, or the samples differ from pass to pass.
        UnavailableError: Workers died again and again, or run a target otherwise than this machine.
    """
    model = PackedModel.of(float_model, workers)
    task = _Comparing(model, targets, source, metric, workers.count, workers.threads)
    shares, seen = zip(*workers.run(task, on_sample), strict=True)
    require_same(seen)
    compared = summed_up(interleaved(shares), metric())
    return {folder: compared[FLOAT, folder] for folder in targets}


@dataclass(frozen=True)
class _Comparing:
    """The task of a worker: of `shares` samples that follow one another, to run one; and what it has seen of all."""

    model: PackedModel
    targets: Mapping[str, PackedTarget]
    source: Callable[[], SampleSource]
    metric: Callable[[], Metric | None]
    shares: int
    threads: int

    def __call__(self, share: int, on_sample: Callable[[], None]) -> tuple[tuple[Observation, ...], str]:
        with ExitStack() as stack:
            stack.enter_context(threads_each(self.threads))
            model = stack.enter_context(self.model.unpacked())
            runners = {FLOAT: stack.enter_context(as_written(model.path))}
            runners |= {folder: stack.enter_context(target.runner()) for folder, target in self.targets.items()}
            pairs = [(FLOAT, folder) for folder in self.targets]
            own = Share(self.source(), share, self.shares)
            return tuple(observations(runners, pairs, own, self.metric(), on_sample)), own.seen
