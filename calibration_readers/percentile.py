"""Clip a fixed share of the values, whatever their distribution."""

from __future__ import annotations

import numpy as np

from qdeploy.affine import Range
from qdeploy.errors import InputError
from qdeploy.reader import CalibrationReader
from qdeploy.scheme import Scheme
from qdeploy.statistics import TensorStatistics


class Percentile(CalibrationReader):
    """The range that holds a given percentage of the values.

    Asymmetric schemes leave out half of the rest in each tail: limits at the quantiles (100 − p)/200 and
    (100 + p)/200. Symmetric schemes take the quantile p/100 of |x|. ONNX Runtime's percentile calibrator does the
    same. A bin's values are taken as evenly spread, so a limit is exact to within a bin's width (1.6 %).

    Args:
        percentile: Percentage of the values to keep: above 50, at most 100.

    Raises:
        InputError: The percentage is outside these bounds.
    """

    def __init__(self, percentile: float = 99.99) -> None:
        if not 50.0 < percentile <= 100.0:
            what = f"The percentile {percentile} is not above 50 and at most 100."
            raise InputError(what, "Give the percentage of values to keep, for example 99.99.")
        self.percentile = percentile

    def range(self, statistics: TensorStatistics, scheme: Scheme) -> Range:
        """The interval between two quantiles, or of a quantile of |x| to both sides."""
        bins = statistics.bins
        if bins.count.size == 0:
            return Range(statistics.minimum, statistics.maximum)
        # The distribution function is linear within bins and flat between them: its corners say all of it.
        edges = np.stack([bins.low, bins.high], axis=1).ravel()
        total = np.cumsum(bins.count)
        below = np.stack([total - bins.count, total], axis=1).ravel()
        if not scheme.symmetric:
            tail = (1.0 - self.percentile / 100.0) / 2.0 * total[-1]
            low, high = np.interp([tail, total[-1] - tail], below, edges)
            return Range(low, high)
        magnitudes = np.unique(np.abs(edges))
        within = np.interp(magnitudes, edges, below) - np.interp(-magnitudes, edges, below)
        limit = np.interp(self.percentile / 100.0 * total[-1], within, magnitudes)
        return Range(max(-limit, statistics.minimum), min(limit, statistics.maximum))
