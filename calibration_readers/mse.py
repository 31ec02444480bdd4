"""The range of least squared error: what clipping costs outside against what rounding costs inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.affine import Affine, Range, affine_from_limits
from qdeploy.reader import CalibrationReader
from qdeploy.scheme import Scheme
from qdeploy.statistics import Bins, TensorStatistics

Array = NDArray[np.floating[Any]]
Loss = Callable[[Array, Array], Array]
"""Lower and upper limits of n candidate ranges, broadcast to [n] → the loss of each, [n]."""


class Mse(CalibrationReader):
    """The limits that minimise the expected squared error of quantizing the tensor with the scheme.

    A bin's values are taken as evenly spread over it, and the error is then integrated exactly, so it holds for bins
    narrower than a step and for bins that span many (the usual step²/12 is its limit for those).
    """

    def range(self, statistics: TensorStatistics, scheme: Scheme) -> Range:
        """The best range within the observed extremes; both limits are searched unless the scheme is symmetric."""

        def loss(low: Array, high: Array) -> Array:
            return squared_error(
                statistics.bins, affine_from_limits(low, high, scheme.integer, symmetric=scheme.symmetric)
            )

        return best_range(loss, statistics, scheme)


def squared_error(bins: Bins, affine: Affine) -> Array:
    """Expected Σ (x − x̂)² over all values of a histogram, for n quantizations at once.

    Args:
        bins: The histogram.
        affine: Scales and zero points of n quantizations of the whole tensor, each of shape [n].

    Returns:
        One error for each, shape [n], in the tensor's units squared.
    """
    scale = affine.scale.astype(np.float64)[:, None]
    lowest = affine.integer.qmin - affine.zero_point.astype(np.float64)[:, None]
    highest = affine.integer.qmax - affine.zero_point.astype(np.float64)[:, None]

    def steps_and_rest(x: Array) -> tuple[Array, Array]:
        steps = np.clip(np.rint(x / scale), lowest, highest)
        return steps, x - steps * scale

    def integral(x: Array) -> Array:
        # ∫ (t − t̂)² dt from 0 to x: scale³/12 for each whole step, then rest³/3, which also holds beyond the limits.
        steps, rest = steps_and_rest(x)
        return np.asarray(steps * (scale**3 / 12.0) + rest * rest * rest / 3.0)

    spread = bins.high > bins.low
    density = bins.count[spread] / (bins.high[spread] - bins.low[spread])
    _, rest = steps_and_rest(bins.low[~spread])
    within = (integral(bins.high[spread]) - integral(bins.low[spread])) @ density
    return np.asarray(within + rest**2 @ bins.count[~spread])


def best_range(loss: Loss, statistics: TensorStatistics, scheme: Scheme) -> Range:
    """The range of least loss among those within the observed extremes.

    First one threshold for both sides, [−t, t] cut at the extremes; then, if the scheme lets the limits differ and
    the tensor has values of both signs, each limit in turn with the other held.
    """
    lowest, highest = min(statistics.minimum, 0.0), max(statistics.maximum, 0.0)
    if lowest == highest:
        return Range(lowest, highest)
    peak = max(-lowest, highest)
    threshold = least(lambda t: loss(np.maximum(-t, lowest), np.minimum(t, highest)), peak)
    low, high = max(-threshold, lowest), min(threshold, highest)
    if scheme.symmetric or lowest == 0.0 or highest == 0.0:
        return Range(low, high)

    def loss_of_low(t: Array) -> Array:
        return loss(-t, np.asarray(high))

    def loss_of_high(t: Array) -> Array:
        return loss(np.asarray(low), t)

    for _ in range(2):
        low = -least(loss_of_low, -lowest)
        high = least(loss_of_high, highest)
    return Range(low, high)


def least(loss: Callable[[Array], Array], extreme: float) -> float:
    """The threshold in (0, extreme] of least loss, to within 0.2 %; the largest of equals.

    Thresholds are fractions of the extreme in geometric steps: two an octave down to 2^-15, then finer and finer ones
    around the best so far.
    """
    exponents = -np.arange(31) / 2.0
    for reach in (1 / 2, 1 / 8, 1 / 32, 1 / 128):
        best = exponents[np.argmin(loss(extreme * 2.0**exponents))]
        exponents = np.minimum(best + np.linspace(reach, -reach, 9), 0.0)
    return float(extreme * 2.0 ** exponents[np.argmin(loss(extreme * 2.0**exponents))])
