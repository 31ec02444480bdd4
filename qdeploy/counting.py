"""The counting loop of calibration: one tensor's values into its tally, compiled by numba where that is installed.

Extremes are found on bit patterns mapped to integers of the same order, which vectorize where float comparisons,
because of NaN, do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.statistics import BIN_SHIFT, BINS, LIMBS, TensorStatistics, carry, fixed_point, keys_of, values_of

LANES = 4
"""Interleaved tables: values that follow one another often share a bin, and waiting for the last store costs most."""

FLUSH_AFTER = 1 << 30
"""Values after which the 32-bit tables, and the limbs' headroom, are emptied into wide ones."""

_LOWEST_KEY = -(1 << 31)
_HIGHEST_KEY = (1 << 31) - 1
_INFINITY_KEY = 0x7F800000
_NON_FINITE_BINS = tuple(slice(end - (0x800000 >> BIN_SHIFT), end) for end in (BINS // 2, BINS))
"""The last bins of each sign: their exponent is all ones."""


Kernel = Callable[..., tuple[int, int]]


@cache
def kernel() -> Kernel:
    """The compiled loop, or the numpy one without numba. Returns the keys of the smallest and the largest value.

    Arguments: values [outer, groups, inner, members], see `as_channels`; the same memory as int32; table [bins, lanes];
    low and high keys [channels] and sums in limbs [channels, 5], all three updated in place unless a value was not
    finite.
    """
    try:
        from qdeploy.counting_numba import tally
    except ImportError:
        return tally_with_numpy
    compiled: Kernel = tally
    return compiled


def tally_with_numpy(
    values: NDArray[np.float32],
    bits: NDArray[np.int32],
    table: NDArray[np.int32],
    low: NDArray[np.int32],
    high: NDArray[np.int32],
    limbs: NDArray[np.int64],
) -> tuple[int, int]:
    """The loop without numba: the same counts and extremes, and sums equal up to their last float64 digits."""
    table[:, 0] += np.bincount(bits.reshape(-1).view(np.uint32) >> BIN_SHIFT, minlength=BINS).astype(np.int32)
    keys = keys_of(values)
    lowest, highest = keys.min(axis=(0, 2)).reshape(-1), keys.max(axis=(0, 2)).reshape(-1)
    if is_finite(int(lowest.min()), int(highest.max())):
        np.minimum(low, lowest, out=low)
        np.maximum(high, highest, out=high)
        limbs += fixed_point(values.sum(axis=(0, 2), dtype=np.float64).reshape(-1))
    return int(lowest.min()), int(highest.max())


def is_finite(lowest: int, highest: int) -> bool:
    """Whether values are all finite, by the keys of the smallest and the largest of them."""
    return lowest > -_INFINITY_KEY - 1 and highest < _INFINITY_KEY


@dataclass
class Tally:
    """One tensor's running statistics within one worker; the only thing of calibration that changes in place.

    Attributes:
        name: The tensor's.
        channel_axis: Of its shape; None to count it as one channel.
        channels: How many.
        block: So many channels lie side by side in memory, as in `as_channels`.
    """

    name: str
    channel_axis: int | None
    channels: int
    block: int = 1
    _pending: int = 0
    _table: NDArray[np.int32] = field(default_factory=lambda: np.zeros((BINS, LANES), np.int32))
    _histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def __post_init__(self) -> None:
        self._low = np.full(self.channels, _HIGHEST_KEY, np.int32)
        self._high = np.full(self.channels, _LOWEST_KEY, np.int32)
        self._limbs = np.zeros((self.channels, LIMBS), np.int64)
        self._count = np.zeros(self.channels, np.int64)
        self._whole_count = 0
        self._adds = 0

    def add(self, array: NDArray[Any]) -> tuple[int, int]:
        """Count one sample's tensor; the keys of its smallest and its largest finite value."""
        if array.size == 0:
            return _HIGHEST_KEY, _LOWEST_KEY
        values = as_channels(array, self.channel_axis, self.block)
        bits = values.view(np.int32)
        if self._pending + values.size > FLUSH_AFTER or self._adds >= 1 << 14:
            self._flush()
        self._pending += values.size
        self._adds += 1
        lowest, highest = kernel()(values, bits, self._table, self._low, self._high, self._limbs)
        if not is_finite(lowest, highest):
            return self._add_finite_part(values)
        self._whole_count += values.size // self.channels
        return lowest, highest

    def _add_finite_part(self, values: NDArray[np.float32]) -> tuple[int, int]:
        finite = np.isfinite(values)
        keys = keys_of(values)
        low = np.where(finite, keys, _HIGHEST_KEY).min(axis=(0, 2)).reshape(-1)
        high = np.where(finite, keys, _LOWEST_KEY).max(axis=(0, 2)).reshape(-1)
        np.minimum(self._low, low, out=self._low)
        np.maximum(self._high, high, out=self._high)
        self._limbs += fixed_point(np.where(finite, values, 0.0).sum(axis=(0, 2), dtype=np.float64).reshape(-1))
        self._count += finite.sum(axis=(0, 2)).reshape(-1)
        return int(low.min()), int(high.max())

    def _flush(self) -> None:
        self._histogram += self._lanes()
        self._table[:] = 0
        self._limbs = carry(self._limbs)
        self._pending = self._adds = 0

    def _lanes(self) -> NDArray[np.int32]:
        """The counts of all lanes together; ten times faster than `sum(axis=1)`, whose inner loop is four long."""
        return reduce(np.add, self._table.T)

    def statistics(self) -> TensorStatistics:
        """What was counted so far."""
        histogram = self._histogram + self._lanes()
        non_finite = int(sum(histogram[bins].sum() for bins in _NON_FINITE_BINS))
        for bins in _NON_FINITE_BINS:
            histogram[bins] = 0
        count = self._count + self._whole_count
        seen = count > 0
        return TensorStatistics(
            self.name,
            self.channel_axis,
            histogram,
            non_finite,
            np.where(seen, values_of(self._low), np.float32(np.inf)),
            np.where(seen, values_of(self._high), np.float32(-np.inf)),
            count,
            carry(self._limbs),
        )


def as_channels(array: NDArray[Any], axis: int | None, block: int = 1) -> NDArray[np.float32]:
    """A tensor as contiguous float32 [outer, groups, inner, members], where channel = group · members + member.

    Channels that follow one another in memory are members of a group; others are groups of one member.

    Args:
        array: The tensor.
        axis: Of its channels; None for one channel.
        block: If more than 1, memory is in the order [N, C / block, H, W, block], whatever the shape [N, C, H, W] says.
    """
    values = np.ascontiguousarray(array, np.float32)
    if axis is None:
        return values.reshape(1, 1, -1, 1)
    if block > 1:
        return values.reshape(values.shape[0], values.shape[1] // block, -1, block)
    axis %= values.ndim
    outer, channels = math.prod(values.shape[:axis]), values.shape[axis]
    inner = math.prod(values.shape[axis + 1 :])
    return values.reshape(1, 1, outer, channels) if inner == 1 else values.reshape(outer, channels, inner, 1)
