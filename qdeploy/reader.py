"""The contract of a calibration reader: statistics of one tensor in, its range out."""

from __future__ import annotations

from abc import ABC, abstractmethod

from qdeploy.affine import Range
from qdeploy.scheme import Scheme
from qdeploy.statistics import TensorStatistics


class CalibrationReader(ABC):
    """Chooses the real interval that a tensor's integers cover.

    A reader is stateless and cheap: it sees only statistics, so any number of readers, schemes and targets share
    one calibration pass. Those with a parameter take it as their constructor's only argument, with a default.
    """

    @abstractmethod
    def range(self, statistics: TensorStatistics, scheme: Scheme) -> Range:
        """The range of one tensor under a scheme; contains zero and lies within the observed extremes."""
