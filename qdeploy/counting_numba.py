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
_WIDTH = 64
"""Values that are compared with as many before they come to their channels."""
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
            row, reals = bits[o, c].reshape(-1), values[o, c].reshape(-1)
            smallest, largest, partial = _HIGHEST, _LOWEST, 0.0
            for i in range(row.size):
                key = row[i] ^ ((row[i] >> 31) & _MAGNITUDE)
                smallest, largest = min(smallest, key), max(largest, key)
                partial += reals[i]
            low[c], high[c] = min(low[c], smallest), max(high[c], largest)
            total[c] += partial


@numba.njit(nogil=True, cache=True)
def _scan_members(values, bits, low, high, total):  # noqa: ANN001, ANN202
    """Members of a group side by side, some rows of them at a time: short vectors would wait for their own stores."""
    members = values.shape[3]
    width = max(1, _WIDTH // members) * members
    lows, highs, sums = np.empty(width, np.int32), np.empty(width, np.int32), np.empty(width, np.float64)
    for o in range(values.shape[0]):
        for g in range(values.shape[1]):
            row, reals = bits[o, g].reshape(-1), values[o, g].reshape(-1)
            own = slice(g * members, (g + 1) * members)
            own_low, own_high, own_total = low[own], high[own], total[own]
            whole = row.size // (4 * width) * 4 * width
            lows[:], highs[:], sums[:] = _HIGHEST, _LOWEST, 0.0
            _scan_four_each(row[:whole], reals[:whole], lows, highs, sums)
            for start in range(whole, row.size, members):
                part = slice(start, start + members)
                _scan_each(row[part], reals[part], own_low, own_high, own_total)
            for start in range(0, width, members):
                for m in range(members):
                    own_low[m] = min(own_low[m], lows[start + m])
                    own_high[m] = max(own_high[m], highs[start + m])
                    own_total[m] += sums[start + m]


@numba.njit(nogil=True, cache=True)
def _scan_each(row, reals, low, high, total):  # noqa: ANN001, ANN202
    for m in range(low.size):
        key = row[m] ^ ((row[m] >> 31) & _MAGNITUDE)
        low[m], high[m] = min(low[m], key), max(high[m], key)
        total[m] += reals[m]


@numba.njit(nogil=True, cache=True)
def _scan_four_each(row, reals, low, high, total):  # noqa: ANN001, ANN202
    width = low.size
    for start in range(0, row.size, 4 * width):
        a, b = row[start : start + width], row[start + width : start + 2 * width]
        c, d = row[start + 2 * width : start + 3 * width], row[start + 3 * width : start + 4 * width]
        p, q = reals[start : start + width], reals[start + width : start + 2 * width]
        r, s = reals[start + 2 * width : start + 3 * width], reals[start + 3 * width : start + 4 * width]
        for m in range(width):
            e, f = a[m] ^ ((a[m] >> 31) & _MAGNITUDE), b[m] ^ ((b[m] >> 31) & _MAGNITUDE)
            g, h = c[m] ^ ((c[m] >> 31) & _MAGNITUDE), d[m] ^ ((d[m] >> 31) & _MAGNITUDE)
            low[m] = min(low[m], e, f, g, h)
            high[m] = max(high[m], e, f, g, h)
            total[m] += (np.float64(p[m]) + np.float64(q[m])) + (np.float64(r[m]) + np.float64(s[m]))


@numba.njit(nogil=True, cache=True)
def tally(values, bits, table, low, high, limbs):  # noqa: ANN001, ANN201
    """See `qdeploy.counting.kernel`."""
    channels = values.shape[1] * values.shape[3]
    _count(bits.reshape(-1).view(np.uint32), table)
    lowest = np.full(channels, _HIGHEST, np.int32)
    highest = np.full(channels, _LOWEST, np.int32)
    total = np.zeros(channels, np.float64)
    if values.shape[3] == 1:
        _scan_rows(values, bits, lowest, highest, total)
    else:
        _scan_members(values, bits, lowest, highest, total)
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
