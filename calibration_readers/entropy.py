"""The range that loses least information: Kullback–Leibler divergence of the quantized from the clipped distribution.

Migacz, "8-bit inference with TensorRT", GTC 2017. For a candidate range, the reference P is the distribution with
the clipped values moved to its edges, and Q is the unclipped distribution merged into the scheme's levels, each level
then spread evenly over the places it covers. The range of least KL(P‖Q) wins.

The published recipe puts 2,048 equal bins over the observed maximum and tries the first 128, 129, … of them. Here
four things differ, each for a reason:

- P is resolved to a fixed part of the candidate's own step. With fixed bins a low threshold leaves one bin a level,
  where merging costs nothing: the recipe is drawn to low thresholds, above all by a peak near zero (ReLU, GELU). Here
  a peak narrower than that part costs every candidate the same, and an outlier takes no resolution from the rest.
- Exact zeros are left out: every candidate represents them exactly, however many there are.
- A level is spread over all that it covers between the observed extremes, empty places included. Otherwise a step so
  wide that all values fall into one place would seem free of loss.
- Levels are those of the scheme, zero point included, with their true rounding intervals, on the signed axis: one
  definition for symmetric and asymmetric schemes.
"""

from __future__ import annotations

import numpy as np

from qdeploy.affine import Affine, FloatArray, Range, affine_from_limits
from qdeploy.reader import CalibrationReader, best_range
from qdeploy.scheme import Scheme
from qdeploy.statistics import Bins, TensorStatistics

PIECES = 9
"""Places that a level is resolved into. Odd, so that the values which the scheme represents exactly, where peaks such
as ReLU6's stand, lie in the middle of a place and not between two."""

MOST_BITS = 10
"""With more bits, nearly all levels are finer than the histogram, which then shows what clipping loses but not what
rounding loses: nothing is clipped."""


class Entropy(CalibrationReader):
    """The limits of least information loss, within the observed extremes.

    Both limits are searched, unless the scheme is symmetric. At least half of the values that are not zero are kept.
    """

    def range(self, statistics: TensorStatistics, scheme: Scheme) -> Range:
        """The best range; the observed extremes for types of more than 10 bits."""
        bins = without_zeros(statistics.bins)
        if bins.count.size == 0 or scheme.integer.bits > MOST_BITS:
            return Range(statistics.minimum, statistics.maximum)

        def loss(low: FloatArray, high: FloatArray) -> FloatArray:
            return divergence(bins, affine_from_limits(low, high, scheme.integer, symmetric=scheme.symmetric))

        return best_range(loss, statistics, scheme)


def without_zeros(bins: Bins) -> Bins:
    """The bins but for those that hold exact zeros (and the smallest subnormal numbers)."""
    kept = (bins.low != 0.0) & (bins.high != 0.0)
    return Bins(bins.low[kept], bins.high[kept], bins.count[kept])


def divergence(bins: Bins, affine: Affine) -> FloatArray:
    """KL(P‖Q) in nats for n quantizations at once.

    Args:
        bins: The histogram; at least one bin.
        affine: Scales and zero points of n quantizations of the whole tensor, each of shape [n].

    Returns:
        One divergence for each, shape [n]; infinite where more than half of the values are clipped: with few values
        left, P and Q agree on them and the divergence says nothing.
    """
    levels = affine.integer.qmax - affine.integer.qmin + 1
    lowest = affine.integer.qmin - affine.zero_point.astype(np.float64)[:, None] - 0.5
    edges = affine.scale.astype(np.float64)[:, None] * (lowest + np.arange(levels * PIECES + 1) / PIECES)
    below, total = values_below(bins, edges)
    unclipped = np.diff(below, axis=1)
    reference = with_clipped(unclipped, below[:, 0], total - below[:, -1])

    by_level = (len(edges), levels, PIECES)
    observed = (edges[:, 1:] > bins.low[0]) & (edges[:, :-1] < bins.high[-1])
    share = unclipped.reshape(by_level).sum(axis=2) / np.maximum(observed.reshape(by_level).sum(axis=2), 1)
    quantized = np.repeat(share, PIECES, axis=1)

    # With P = reference / total and Q = quantized / inside,
    # KL = Σ reference·log(reference / quantized) / total + log(inside / total).
    inside = unclipped.sum(axis=1)
    ratio = np.divide(reference, quantized, out=np.ones_like(reference), where=unclipped > 0.0)
    nats = (reference * np.log(ratio)).sum(axis=1) / total + np.log(np.maximum(inside, 1.0) / total)
    return np.where(inside >= total / 2, nats, np.inf)


def values_below(bins: Bins, x: FloatArray) -> tuple[FloatArray, float]:
    """How many values lie below each x, and how many there are in all."""
    total = np.cumsum(bins.count)
    corners = np.stack([bins.low, bins.high], axis=1).ravel()
    return np.interp(x, corners, np.stack([total - bins.count, total], axis=1).ravel()), float(total[-1])


def with_clipped(unclipped: FloatArray, below: FloatArray, above: FloatArray) -> FloatArray:
    """Counts [n, places] with the clipped values [n] of each side added to the outermost places that hold any."""
    held = unclipped > 0.0
    place = np.arange(unclipped.shape[1])
    first = np.argmax(held, axis=1)[:, None]
    last = place[-1] - np.argmax(held[:, ::-1], axis=1)[:, None]
    return np.asarray(unclipped + (place == first) * below[:, None] + (place == last) * above[:, None])
