"""Confidence intervals by resampling (Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapters 6 and 13).

The percentile interval: draw as many items as there are, with replacement, many times over; compute the statistic
of each draw; cut the same share off both ends. Draws come from a fixed seed, so that equal data give equal intervals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]

Summarize = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""From what was measured of the items of each draw, [draws, items, ...], to one figure a draw, [draws]."""

_DRAWS_AT_ONCE = 1 << 20
"""Indices held in memory at a time (8 MiB), whatever the number of items."""


def percentile_interval(
    statistic: Callable[[NDArray[np.int64]], NDArray[Any]],
    items: int,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The percentile bootstrap interval of a statistic of `items` items.

    Args:
        statistic: Takes drawn indices, shape [draws, items], and gives the statistic of each draw, shape [draws].
        items: How many items were measured, at least 1.
        confidence: Share of the draws within the interval.
        resamples: How many draws.
        seed: Of the random numbers.
    """
    rng = np.random.default_rng(seed)
    draws = max(1, _DRAWS_AT_ONCE // items)
    parts = [
        statistic(rng.integers(items, size=(min(draws, resamples - start), items)))
        for start in range(0, resamples, draws)
    ]
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(np.concatenate(parts), [tail, 1.0 - tail])
    return float(low), float(high)


def paired_drops(
    reference: NDArray[np.float64], rows: NDArray[np.float64], summarize: Summarize | None = None
) -> Callable[[NDArray[np.int64]], NDArray[np.float64]]:
    """How much less than the reference a model scores, as a statistic of drawn items.

    Args:
        reference: What was measured of each item with the reference, shape [items, ...].
        rows: The same of the other model, on the same items.
        summarize: From what was measured to the figure; None for the mean, of which the drops are exact.
    """
    if summarize is None:
        drops = reference - rows
        return lambda indices: drops[indices].mean(axis=1)
    return lambda indices: summarize(reference[indices]) - summarize(rows[indices])


def paired_interval(
    reference: NDArray[np.float64],
    rows: NDArray[np.float64],
    summarize: Summarize | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The interval of the drop over items that both models were given: both figures are of the same draws.

    Pairing leaves out what makes an item hard for both, so the interval is much narrower than that of either figure.

    Args:
        reference: What was measured of each item with the reference, shape [items, ...].
        rows: The same of the other model, on the same items.
        summarize: From what was measured to the figure; None for the mean.
        confidence: Share of the draws within the interval.
        resamples: How many draws.
        seed: Of the random numbers.
    """
    drops = paired_drops(reference, rows, summarize)
    return percentile_interval(drops, len(rows), confidence=confidence, resamples=resamples, seed=seed)
