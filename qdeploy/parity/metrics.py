"""What is measured on the outputs: scores against labels, and differences from a reference without labels."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qdeploy.affine import sqnr_from_energies
from qdeploy.backend import Arrays
from qdeploy.errors import InputError
from qdeploy.parity.bootstrap import Summarize
from qdeploy.parity.correlation import Correlated, labelled_values, pearson, places, spearman
from qdeploy.registry import suggestion

Scores = NDArray[np.float64]


class Scorer(Protocol):
    """Gathers what a metric has measured of one model, sample by sample."""

    def add(self, measured: Scores) -> None:
        """Take what was measured of a sample."""

    def rows(self) -> Scores:
        """What was gathered: scores, shape [items], or rows of several figures, shape [items, ...]."""


@dataclass(frozen=True)
class Metric:
    """Measures outputs against labels, higher being better.

    Attributes:
        name: For the report and for messages.
        measure: From a sample's outputs and labels to what a scorer takes of it; it knows of no other sample.
        scorer: Begins a pass over one model's samples.
        summarize: From what a scorer gathered to the model's figure, for many draws at once; None for the mean.
    """

    name: str
    measure: Callable[[Arrays, NDArray[Any]], Scores]
    scorer: Callable[[], Scorer]
    summarize: Summarize | None = None

    def figure(self, rows: Scores) -> float:
        """The model's figure over all that its scorer gathered."""
        return float(rows.mean() if self.summarize is None else self.summarize(rows[np.newaxis])[0])


class _Scored:
    """Keeps the scores of items or of batches."""

    def __init__(self) -> None:
        self._parts: list[Scores] = []

    def add(self, measured: Scores) -> None:
        self._parts.append(measured)

    def rows(self) -> Scores:
        return np.concatenate(self._parts)


def metric_from_name(name: str) -> Metric:
    """A metric that qdeploy knows.

    Raises:
        InputError: No metric has this name.
    """
    if name not in _METRICS:
        raise InputError(f"Unknown metric {name!r}.", suggestion(name, sorted(_METRICS)))
    return _METRICS[name]


def metric_from_callable(function: Callable[[Arrays, NDArray[Any]], Any], name: str = "") -> Metric:
    """The user's own metric.

    Args:
        function: `function(outputs, labels)` gives a float for the sample, or one score for each item of its batch.
        name: What to call it; empty for the function's own name.
    """
    name = name or getattr(function, "__name__", type(function).__name__)
    return Metric(name, partial(_call, function, name), _Scored)


def _call(function: Callable[[Arrays, NDArray[Any]], Any], name: str, outputs: Arrays, labels: NDArray[Any]) -> Scores:
    try:
        # Standard output belongs to the report, whatever the metric prints.
        with contextlib.redirect_stdout(sys.stderr):
            scores = np.asarray(function(outputs, labels), np.float64)
    except Exception as error:
        what = f"The metric {name!r} raised {type(error).__name__}: {error}."
        raise InputError(what, "It is called with the outputs by name and the sample's labels.") from error
    if scores.shape not in ((), (1,), labels.shape[:1]):
        what = f"The metric {name!r} gave scores of shape {list(scores.shape)} for labels of {list(labels.shape)}."
        raise InputError(what, "It must return a float, or one score for each item of the batch.")
    if not np.isfinite(scores).all():
        raise InputError(f"The metric {name!r} gave {scores.tolist()}.", "Its scores must be finite numbers.")
    return np.atleast_1d(scores)


def _top_k(k: int, outputs: Arrays, labels: NDArray[Any]) -> Scores:
    """1 where the label is among the k highest logits of the first output, else 0.

    Of equal logits the first counts as the higher, as argmax has it: a model that gives the same logit to every
    class must not score. A row that holds NaN has no order and misses.
    """
    name, logits = next(iter(outputs.items()))
    labels = _class_labels(f"top{k}", labels)
    if logits.ndim != 2 or logits.shape[0] != labels.size or logits.shape[1] <= k:
        what = f"The metric 'top{k}' needs {labels.size} × classes logits, with more than {k} classes; "
        what += f"the first output {name!r} has shape {list(logits.shape)}."
        raise InputError(what, "Give a metric of your own: a callable that takes the outputs and the labels.")
    classes = logits.shape[1]
    if not ((labels >= 0) & (labels < classes)).all():
        wrong = labels[(labels < 0) | (labels >= classes)][0]
        what = f"The label {wrong} is none of the {classes} classes of the output {name!r}."
        raise InputError(what, f"Labels count from 0 to {classes - 1}.")
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    ahead = (logits > own) | ((logits == own) & (np.arange(classes) < labels[:, None]))
    hits: Scores = ((ahead.sum(axis=1) < k) & ~np.isnan(logits).any(axis=1)).astype(np.float64)
    return hits


def _class_labels(metric: str, labels: NDArray[Any]) -> NDArray[np.int64]:
    if labels.dtype.kind not in "iu":
        what = f"The metric {metric!r} needs class indices as labels; these have dtype {labels.dtype}."
        raise InputError(what, "Give integers, or a metric of your own.")
    return labels.reshape(-1).astype(np.int64)


_METRICS = {
    **{f"top{k}": Metric(f"top{k}", partial(_top_k, k), _Scored) for k in (1, 5)},
    **{
        name: Metric(name, partial(labelled_values, name), partial(Correlated, name, settle), correlation)
        for name, settle, correlation in (("pearson", np.asarray, pearson), ("spearman", places, spearman))
    },
}


@dataclass(frozen=True)
class Difference:
    """How one output differs from its reference, summed over samples, so that no output need be kept.

    Attributes:
        floating: Whether it holds real numbers; of integers only equality is counted.
        values: How many values were compared.
        equal: How many of them equal the reference.
        decisions: Rows along the last axis whose largest value was compared.
        agreeing: Rows whose largest value stands at the same place.
        reshaped: Samples whose output has another shape than the reference.
        incomparable: Values that are NaN, or infinite on one side only. Equal infinities (masks) are no difference.
        signal: Σ reference², over finite values.
        noise: Σ (reference − output)²; infinite if any value is incomparable or any sample reshaped.
        energy: Σ output², over finite values.
        product: Σ reference · output, over finite values.
        largest: max |reference − output|; infinite like `noise`.
        minimum: Smallest finite value of the reference.
        maximum: Largest finite value of the reference.
    """

    floating: bool
    values: int
    equal: int = 0
    decisions: int = 0
    agreeing: int = 0
    reshaped: int = 0
    incomparable: int = 0
    signal: float = 0.0
    noise: float = 0.0
    energy: float = 0.0
    product: float = 0.0
    largest: float = 0.0
    minimum: float = math.inf
    maximum: float = -math.inf

    def merge(self, other: Difference) -> Difference:
        """The difference over both sets of samples."""
        return Difference(
            self.floating,
            self.values + other.values,
            self.equal + other.equal,
            self.decisions + other.decisions,
            self.agreeing + other.agreeing,
            self.reshaped + other.reshaped,
            self.incomparable + other.incomparable,
            self.signal + other.signal,
            self.noise + other.noise,
            self.energy + other.energy,
            self.product + other.product,
            max(self.largest, other.largest),
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
        )

    @property
    def equal_share(self) -> float:
        """Share of values equal to the reference; 1 when there were none."""
        return self.equal / self.values if self.values else 1.0

    @property
    def agreement(self) -> float | None:
        """Share of rows whose largest value (the predicted class) is the reference's; None without classes."""
        return self.agreeing / self.decisions if self.decisions else None

    @property
    def sqnr_db(self) -> float | None:
        """10·log10(Σ reference² / Σ (reference − output)²) over all samples; None for integers."""
        if not self.floating:
            return None
        return -math.inf if math.isinf(self.noise) else sqnr_from_energies(self.signal, self.noise)

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between all samples' outputs and references as two long vectors.

        None for integers, when a value could not be compared, and when either vector is zero.
        """
        if not self.floating or math.isinf(self.noise) or self.signal == 0.0 or self.energy == 0.0:
            return None
        return max(-1.0, min(1.0, self.product / math.sqrt(self.signal) / math.sqrt(self.energy)))

    @property
    def max_abs_error(self) -> float | None:
        """Largest |reference − output|, infinite when a value could not be compared; None for integers."""
        return self.largest if self.floating else None

    def steps(self, step: float | None) -> float | None:
        """The largest error in steps of the output; None for integers.

        Args:
            step: The output's scale, or None where it is not quantized: then the reference's range / 255.
        """
        if not self.floating:
            return None
        if self.largest in (0.0, math.inf):
            return self.largest
        step = (self.maximum - self.minimum) / 255.0 if step is None else step
        return self.largest / step if step > 0.0 else math.inf


def difference(reference: NDArray[Any], output: NDArray[Any]) -> Difference:
    """How one sample's output differs from its reference."""
    floating = reference.dtype.kind == "f"
    decisions = reference.size // reference.shape[-1] if floating and _has_classes(reference) else 0
    if reference.shape != output.shape:
        nans = int(np.isnan(output).sum()) if floating else 0
        return Difference(
            floating,
            reference.size,
            decisions=decisions,
            reshaped=1,
            incomparable=nans,
            noise=math.inf,
            largest=math.inf,
        )
    same = (reference == output).reshape(-1)
    equal = int(np.count_nonzero(same))
    if not floating:
        return Difference(floating, reference.size, equal)
    x, y = reference.astype(np.float64).reshape(-1), output.astype(np.float64).reshape(-1)
    with np.errstate(invalid="ignore"):  # the difference of two infinities
        error = np.where(same, 0.0, x - y)
    incomparable = error.size - int(np.count_nonzero(np.isfinite(error)))
    finite = np.isfinite(x)
    x[~finite] = 0.0
    y[~np.isfinite(y)] = 0.0
    return Difference(
        floating,
        reference.size,
        equal,
        decisions,
        _agreeing(reference, output) if decisions else 0,
        incomparable=incomparable,
        signal=float(x @ x),
        noise=math.inf if incomparable else float(error @ error),
        energy=float(y @ y),
        product=float(x @ y),
        largest=math.inf if incomparable else float(np.abs(error).max(initial=0.0)),
        minimum=float(x.min(initial=math.inf, where=finite)),
        maximum=float(x.max(initial=-math.inf, where=finite)),
    )


def _has_classes(array: NDArray[Any]) -> bool:
    return array.ndim > 0 and array.shape[-1] >= 2


def _agreeing(reference: NDArray[Any], output: NDArray[Any]) -> int:
    comparable = ~(np.isnan(reference) | np.isnan(output)).any(axis=-1)
    return int(np.count_nonzero((reference.argmax(axis=-1) == output.argmax(axis=-1)) & comparable))
