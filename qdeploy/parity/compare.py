"""One pass over the samples for any number of runners. Outputs are never kept: only scores and sums are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qdeploy.backend import Arrays, Runner
from qdeploy.errors import InputError, InternalError
from qdeploy.parity.bootstrap import Interval, paired_drops, paired_interval
from qdeploy.parity.metrics import Difference, Metric, Scorer, Scores, difference
from qdeploy.samples.warnings import sample_digest

MASK = np.float64(1e30)
"""A value beyond it stands for an infinite one, as the −3e38 or the lowest float32 of a mask do."""

Pair = tuple[str, str]
"""Names of a reference runner and of the runner that is compared with it."""


class SampleLike(Protocol):
    """What is needed of a sample: whole model inputs, and one label for each item of the batch, or none at all."""

    @property
    def inputs(self) -> Arrays:
        """Model inputs by name, batch included."""

    @property
    def labels(self) -> NDArray[Any] | None:
        """One entry for each item of the batch."""

    @property
    def raw(self) -> Arrays:
        """What preprocessing made the inputs from, by input name; empty without any."""


@dataclass(frozen=True)
class Comparison:
    """A runner against its reference.

    Attributes:
        samples: Items compared: a sample counts as many as its batch holds.
        outputs: The differences by output name, in the graph's order.
        reference_metric: The metric of the reference; None without labels or a metric.
        metric: That of the runner; None also if some of its outputs could not be compared.
        drop: Reference − runner, absolute.
        drop_interval: Paired bootstrap interval of `drop`, 95 %.
        samples_digest: sha256 of the samples as they were before preprocessing, in order, with their labels.
    """

    samples: int
    outputs: Mapping[str, Difference]
    reference_metric: float | None = None
    metric: float | None = None
    drop: float | None = None
    drop_interval: Interval | None = None
    samples_digest: str = ""

    @property
    def first(self) -> Difference:
        """The difference of the first output, which stands for the model in the figures below."""
        return next(iter(self.outputs.values()))

    @property
    def agreement(self) -> float | None:
        """Share of predictions equal to the reference's; None where the first output has no classes."""
        return self.first.agreement

    @property
    def cosine(self) -> float | None:
        """Cosine similarity of the first output, over all samples."""
        return self.first.cosine

    @property
    def sqnr_db(self) -> float | None:
        """SQNR of the first output in dB, over all samples; None for integers."""
        return self.first.sqnr_db

    @property
    def max_abs_error(self) -> float | None:
        """Largest absolute error of the first output; None for integers."""
        return self.first.max_abs_error

    @property
    def sqnr_by_output(self) -> dict[str, float]:
        """SQNR in dB of each output that holds real numbers."""
        return {name: each.sqnr_db for name, each in self.outputs.items() if each.sqnr_db is not None}

    @property
    def equal_by_output(self) -> dict[str, float]:
        """Share of equal values of each output that holds integers."""
        return {name: each.equal_share for name, each in self.outputs.items() if not each.floating}

    @property
    def incomparable(self) -> int:
        """Output values that are NaN, or infinite on one side only, over all outputs."""
        return sum(each.incomparable for each in self.outputs.values())

    @property
    def reshaped(self) -> int:
        """Samples of which an output has another shape than the reference's; of the output where they are most."""
        return max(each.reshaped for each in self.outputs.values())

    def max_steps(self, steps: Mapping[str, float]) -> float:
        """The largest error of any output in its own steps; 0 if all hold integers.

        Args:
            steps: Scales of the quantized outputs, by name. Others count 255 steps over the reference's range.
        """
        errors = (each.steps(steps.get(name)) for name, each in self.outputs.items())
        return max((error for error in errors if error is not None), default=0.0)


def compare(
    runners: Mapping[str, Runner],
    pairs: Sequence[Pair],
    samples: Iterable[SampleLike],
    metric: Metric | None,
    on_sample: Callable[[], None] = lambda: None,
) -> dict[Pair, Comparison]:
    """Run every runner once on every sample and compare each pair.

    Args:
        runners: By name, entered.
        pairs: Reference and compared runner, by name.
        samples: Read once.
        metric: Of labelled samples; None, or unlabelled samples, leave its figures None.
        on_sample: Called after each sample, to show progress.

    Raises:
        InputError: There are no samples, only some of them have labels, or the metric cannot be computed.
    """
    return summed_up(observations(runners, pairs, samples, metric, on_sample), metric)


@dataclass(frozen=True)
class Observation:
    """What is kept of one sample.

    Attributes:
        fingerprint: Tells it from others, whatever is made of it.
        items: As many as its batch holds.
        labelled: Whether it has labels.
        differences: Of each pair, by output name.
        measured: What the metric took of each runner. Missing are those whose outputs could not be compared: a metric
            is not to be blamed for what it makes of NaN.
    """

    fingerprint: bytes
    items: int
    labelled: bool
    differences: Mapping[Pair, Mapping[str, Difference]]
    measured: Mapping[str, Scores]


def observations(
    runners: Mapping[str, Runner],
    pairs: Sequence[Pair],
    samples: Iterable[SampleLike],
    metric: Metric | None,
    on_sample: Callable[[], None] = lambda: None,
) -> Iterator[Observation]:
    """What each sample shows; the arguments are those of `compare`."""
    for sample in samples:
        labels = sample.labels
        outputs = {name: runner.run(sample.inputs) for name, runner in runners.items()}
        differences = {pair: _differences(pair, outputs) for pair in pairs}
        measured = {}
        if metric is not None and labels is not None:
            broken = {pair[1] for pair in pairs if any(each.incomparable for each in differences[pair].values())}
            measured = {name: metric.measure(outputs[name], labels) for name in outputs if name not in broken}
        yield Observation(_fingerprint(sample), _items(sample), labels is not None, differences, measured)
        on_sample()


def summed_up(observed: Iterable[Observation], metric: Metric | None) -> dict[Pair, Comparison]:
    """The comparison of each pair over all samples, in their order: sums of floats depend on it.

    Raises:
        InputError: There are no samples, only some of them have labels, or the metric cannot be computed.
    """
    sums: dict[Pair, dict[str, Difference]] = {}
    scorers: dict[str, Scorer] = {}
    digest = hashlib.sha256()
    items = 0
    labelled = None
    for position, sample in enumerate(observed):
        if labelled not in (None, sample.labelled):
            what = f"Sample {position} has {'labels' if sample.labelled else 'no labels'}, unlike those before it."
            raise InputError(what, "Give labels for every sample, or for none.")
        labelled = sample.labelled
        digest.update(sample.fingerprint)
        items += sample.items
        sums = {pair: _merged(sums.get(pair, {}), seen) for pair, seen in sample.differences.items()}
        if metric is not None:
            if position == 0:
                scorers = {name: metric.scorer() for name in sample.measured}
            scorers = {name: scorer for name, scorer in scorers.items() if name in sample.measured}
            for name, scorer in scorers.items():
                scorer.add(sample.measured[name])
    if labelled is None:
        raise InputError("There are no samples to compare on.", "Check the evaluation data.")
    rows = {name: scorer.rows() for name, scorer in scorers.items()}
    compared = {pair: _comparison(items, sums[pair], metric, rows.get(pair[0]), rows.get(pair[1])) for pair in sums}
    return {pair: replace(each, samples_digest=digest.hexdigest()) for pair, each in compared.items()}


def _fingerprint(sample: SampleLike) -> bytes:
    """What tells a sample from others, whatever is made of it: the file, text or window before preprocessing."""
    labels = () if sample.labels is None else sample.labels.tolist()
    return f"{sample_digest(sample.raw or sample.inputs)} {labels}".encode()


def _items(sample: SampleLike) -> int:
    batched = next(iter(sample.inputs.values())) if sample.labels is None else sample.labels
    return batched.shape[0] if batched.ndim else 1


def _differences(pair: Pair, outputs: Mapping[str, Arrays]) -> dict[str, Difference]:
    reference, compared = outputs[pair[0]], outputs[pair[1]]
    if reference.keys() != compared.keys():
        message = f"{pair[1]} has the outputs {sorted(compared)}, its reference {pair[0]} has {sorted(reference)}"
        raise InternalError(message)
    return {name: difference(_with_masks(array), _with_masks(compared[name])) for name, array in reference.items()}


def _with_masks(output: NDArray[Any]) -> NDArray[Any]:
    """The output with its masks infinite: beside the energy of one −3e38 no error of the other values would show."""
    if output.dtype.kind != "f" or not (masks := np.abs(output) >= MASK).any():
        return output
    return np.where(masks, np.copysign(np.inf, output), output)


def _merged(sums: Mapping[str, Difference], seen: Mapping[str, Difference]) -> dict[str, Difference]:
    return {name: sums[name].merge(each) if name in sums else each for name, each in seen.items()}


def _comparison(
    items: int,
    outputs: Mapping[str, Difference],
    metric: Metric | None,
    reference_rows: Scores | None,
    rows: Scores | None,
) -> Comparison:
    if metric is None or reference_rows is None:
        return Comparison(items, outputs)
    reference_metric = metric.figure(reference_rows)
    if rows is None:
        return Comparison(items, outputs, reference_metric)
    if len(reference_rows) != len(rows):
        what = f"The metric gave {len(reference_rows)} scores for one model and {len(rows)} for another, "
        what += "on the same samples."
        raise InputError(what, "It must return a float always, or always one score for each item of the batch.")
    drops = paired_drops(reference_rows, rows, metric.summarize)
    drop = float(drops(np.arange(len(rows))[np.newaxis])[0])
    interval = paired_interval(reference_rows, rows, metric.summarize)
    return Comparison(items, outputs, reference_metric, metric.figure(rows), drop, interval)
