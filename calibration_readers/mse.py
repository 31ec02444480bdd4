"""The range of least squared error: what clipping costs outside against what rounding costs inside."""

from __future__ import annotations

import numpy as np

from qdeploy.affine import Affine, FloatArray, Range, affine_from_limits
from qdeploy.reader import CalibrationReader, best_range
from qdeploy.scheme import Scheme
from qdeploy.statistics import Bins, TensorStatistics


class Mse(CalibrationReader):
    """The limits that minimise the expected squared error of quantizing the tensor with the scheme.

    A bin's values are taken as evenly spread over it, and the error is then integrated exactly, so it holds for bins
    narrower than a step and for bins that span many (the usual step²/12 is its limit for those).
    """

    def range(self, statistics: TensorStatistics, scheme: Scheme) -> Range:
        """The best range within the observed extremes; both limits are searched unless the scheme is symmetric."""

        def loss(low: FloatArray, high: FloatArray) -> FloatArray:
            affine = affine_from_limits(low, high, scheme.integer, symmetric=scheme.symmetric)
            return squared_error(statistics.bins, affine)

        return best_range(loss, statistics, scheme)


def squared_error(bins: Bins, affine: Affine) -> FloatArray:
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

    def steps_and_rest(x: FloatArray) -> tuple[FloatArray, FloatArray]:
        steps = np.clip(np.rint(x / scale), lowest, highest)
        return steps, x - steps * scale

    def integral(x: FloatArray) -> FloatArray:
        # ∫ (t − t̂)² dt from 0 to x: scale³/12 for each whole step, then rest³/3, which also holds beyond the limits.
        steps, rest = steps_and_rest(x)
        return np.asarray(steps * (scale**3 / 12.0) + rest * rest * rest / 3.0)

    spread = bins.high > bins.low
    density = bins.count[spread] / (bins.high[spread] - bins.low[spread])
    _, rest = steps_and_rest(bins.low[~spread])
    within = (integral(bins.high[spread]) - integral(bins.low[spread])) @ density
    return np.asarray(within + rest**2 @ bins.count[~spread])
