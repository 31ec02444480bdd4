"""The whole observed range: nothing is ever clipped."""

from __future__ import annotations

from qdeploy.affine import Range
from qdeploy.reader import CalibrationReader
from qdeploy.scheme import Scheme
from qdeploy.statistics import TensorStatistics


class MinMax(CalibrationReader):
    """From the smallest to the largest value seen, exactly. One outlier costs every other value resolution."""

    def range(self, statistics: TensorStatistics, scheme: Scheme) -> Range:  # noqa: ARG002  (part of the contract)
        """The observed extremes, whatever the scheme."""
        return Range(statistics.minimum, statistics.maximum)
