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


def paired_interval(
    reference_scores: NDArray[np.float64],
    scores: NDArray[np.float64],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The interval of mean(reference − score) over items that both models were given.

    Pairing leaves out what makes an item hard for both, so the interval is much narrower than that of either mean.

    Args:
        reference_scores: Scores of the reference, shape [items].
        scores: Scores of the other model on the same items, shape [items].
        confidence: Share of the draws within the interval.
        resamples: How many draws.
        seed: Of the random numbers.
    """
    drops = reference_scores - scores
    return percentile_interval(
        lambda indices: drops[indices].mean(axis=1),
        drops.size,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )
