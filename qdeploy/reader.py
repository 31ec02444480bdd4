"""The contract of a calibration reader: statistics of one tensor in, its range out; and a search for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from qdeploy.affine import FloatArray, Range
from qdeploy.scheme import Scheme
from qdeploy.statistics import TensorStatistics

Loss = Callable[[FloatArray, FloatArray], FloatArray]
"""Lower and upper limits of n candidate ranges, broadcast to [n] → the loss of each, [n]."""


class CalibrationReader(ABC):
    """Chooses the real interval that a tensor's integers cover.

    A reader is stateless and cheap: it sees only statistics, so any number of readers, schemes and targets share
    one calibration pass. Those with a parameter take it as their constructor's only argument, with a default.
    """

    @abstractmethod
    def range(self, statistics: TensorStatistics, scheme: Scheme) -> Range:
        """The range of one tensor under a scheme; contains zero and lies within the observed extremes."""


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

    def loss_of_low(t: FloatArray) -> FloatArray:
        return loss(-t, np.asarray(high))

    def loss_of_high(t: FloatArray) -> FloatArray:
        return loss(np.asarray(low), t)

    for _ in range(2):
        low = -least(loss_of_low, -lowest)
        high = least(loss_of_high, highest)
    return Range(low, high)


def least(loss: Callable[[FloatArray], FloatArray], extreme: float) -> float:
    """The threshold in (0, extreme] of least loss, to within 0.2 %; the largest of equals.

    Thresholds are fractions of the extreme in geometric steps: two an octave down to 2^-15, then finer and finer ones
    around the best so far.
    """
    exponents = -np.arange(31) / 2.0
    for reach in (1 / 2, 1 / 8, 1 / 32, 1 / 128):
        best = exponents[np.argmin(loss(extreme * 2.0**exponents))]
        exponents = np.minimum(best + np.linspace(reach, -reach, 9), 0.0)
    return float(extreme * 2.0 ** exponents[np.argmin(loss(extreme * 2.0**exponents))])
