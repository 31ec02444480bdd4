"""The counting loop, compiled. Only `qdeploy.counting` imports this file, and only where numba is installed."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

import numba  # noqa: TID253 - this file exists to hold what needs numba
import numpy as np

from qdeploy.statistics import BIN_SHIFT, LIMB_BITS, LIMBS, LOWEST_LIMB_EXPONENT

_LOWEST = np.int32(-(1 << 31))
_HIGHEST = np.int32((1 << 31) - 1)
_INFINITY = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF
_LIMB_UNITS = 2.0 ** (LIMB_BITS * np.arange(LIMBS) + LOWEST_LIMB_EXPONENT)


@numba.njit(nogil=True, cache=True)
def _count(bits, table):  # noqa: ANN001, ANN202
    whole = bits.size // 4 * 4
    for i in range(0, whole, 4):
        table[bits[i] >> BIN_SHIFT, 0] += 1
        table[bits[i + 1] >> BIN_SHIFT, 1] += 1
        table[bits[i + 2] >> BIN_SHIFT, 2] += 1
        table[bits[i + 3] >> BIN_SHIFT, 3] += 1
    for i in range(whole, bits.size):
        table[bits[i] >> BIN_SHIFT, 0] += 1


# Reordering lets LLVM sum in vectors; the order is fixed at compile time, so results repeat.
@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "nsz", "contract"})
def _scan_rows(values, bits, low, high, total):  # noqa: ANN001, ANN202
    for o in range(values.shape[0]):
        for c in range(values.shape[1]):
            row, reals = bits[o, c], values[o, c]
            smallest, largest, partial = _HIGHEST, _LOWEST, 0.0
            for i in range(row.size):
                key = row[i] ^ ((row[i] >> 31) & _MAGNITUDE)
                smallest, largest = min(smallest, key), max(largest, key)
                partial += reals[i]
            low[c], high[c] = min(low[c], smallest), max(high[c], largest)
            total[c] += partial


@numba.njit(nogil=True, cache=True)
def _scan_columns(values, bits, low, high, total):  # noqa: ANN001, ANN202
    for o in range(values.shape[0]):
        for c in range(values.shape[1]):
            key = bits[o, c, 0] ^ ((bits[o, c, 0] >> 31) & _MAGNITUDE)
            low[c], high[c] = min(low[c], key), max(high[c], key)
            total[c] += values[o, c, 0]


@numba.njit(nogil=True, cache=True)
def tally(values, bits, table, low, high, limbs):  # noqa: ANN001, ANN201
    """See `qdeploy.counting.kernel`."""
    channels = values.shape[1]
    _count(bits.reshape(-1).view(np.uint32), table)
    lowest = np.full(channels, _HIGHEST, np.int32)
    highest = np.full(channels, _LOWEST, np.int32)
    total = np.zeros(channels, np.float64)
    if values.shape[2] == 1:
        _scan_columns(values, bits, lowest, highest, total)
    else:
        _scan_rows(values, bits, lowest, highest, total)
    smallest, largest = lowest.min(), highest.max()
    if smallest <= -_INFINITY - 1 or largest >= _INFINITY:
        return smallest, largest
    for c in range(channels):
        low[c], high[c] = min(low[c], lowest[c]), max(high[c], highest[c])
        rest = total[c]
        for k in range(LIMBS - 1, -1, -1):
            whole = np.trunc(rest / _LIMB_UNITS[k])
            limbs[c, k] += np.int64(whole)
            rest -= whole * _LIMB_UNITS[k]
    return smallest, largest
