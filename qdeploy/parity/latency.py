"""Latency of several models, measured side by side in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from qdeploy.errors import InternalError
from qdeploy.parity.bootstrap import Interval, percentile_interval

BURST = 5
"""Counted runs of a model in one round."""

FEWEST_ROUNDS = 4
"""Below 20 runs a median says nothing, whatever the time budget."""


@dataclass(frozen=True)
class Latency:
    """The distribution of one model's run times.

    Attributes:
        times_ms: Milliseconds of each run, in the order measured.
    """

    times_ms: tuple[float, ...]

    @property
    def runs(self) -> int:
        """How many times it was measured."""
        return len(self.times_ms)

    @property
    def p50(self) -> float:
        """Median in milliseconds."""
        return float(np.percentile(self.times_ms, 50))

    @property
    def p90(self) -> float:
        """90th percentile in milliseconds."""
        return float(np.percentile(self.times_ms, 90))

    @property
    def p99(self) -> float:
        """99th percentile in milliseconds."""
        return float(np.percentile(self.times_ms, 99))


def measure(
    runs: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 2,
    rounds: int = 20,
    budget_s: float,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Latency]:
    """Time several models in bursts by turns, so that a machine that slows down slows them all.

    A burst is one run that is not counted, since it finds the other model's weights in the caches, and five that are:
    a served model, too, mostly runs after itself.

    Args:
        runs: By name, what to time; each returns only when its work is done.
        warmup: Rounds that are run first and not counted.
        rounds: Rounds that are counted, of one burst a model.
        budget_s: Seconds, warm-up included, after which no further round starts; 4 rounds are counted in any case.
        clock_ns: A monotonic clock in nanoseconds.
    """
    end = clock_ns() + int(budget_s * 1e9)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(warmup + max(rounds, FEWEST_ROUNDS)):
        counted = index - warmup
        if counted >= FEWEST_ROUNDS and clock_ns() >= end:
            break
        for name in _order(list(runs), index):
            burst = _burst(runs[name], clock_ns)
            times[name] += burst if counted >= 0 else []
    return {name: Latency(tuple(each)) for name, each in times.items()}


def _burst(run: Callable[[], object], clock_ns: Callable[[], int]) -> list[float]:
    """Milliseconds of each counted run of one burst."""
    run()
    times = []
    for _ in range(BURST):
        start = clock_ns()
        run()
        times.append((clock_ns() - start) / 1e6)
    return times


def _order(names: list[str], index: int) -> list[str]:
    """The order of one round: forwards and backwards in turn, from another start every second round.

    So no model always runs in the caches that one certain other has left.
    """
    start = index // 2 % len(names)
    order = names[start:] + names[:start]
    return order if index % 2 == 0 else order[::-1]


def median_interval(latency: Latency) -> Interval:
    """The 95 % bootstrap interval of the median, in milliseconds."""
    times = np.array(latency.times_ms)
    return percentile_interval(lambda indices: np.median(times[indices], axis=1), latency.runs)


def speedup(baseline: Latency, other: Latency) -> tuple[float, Interval]:
    """How many times faster `other` is, by the ratio of medians, with its 95 % bootstrap interval.

    Runs are drawn in pairs, since both models were timed in each round. Both must come from the same measurement.
    """
    if baseline.runs != other.runs:
        message = f"latencies of different measurements: {baseline.runs} and {other.runs} runs"
        raise InternalError(message)
    slow, fast = np.array(baseline.times_ms), np.array(other.times_ms)
    interval = percentile_interval(
        lambda indices: np.median(slow[indices], axis=1) / np.median(fast[indices], axis=1), baseline.runs
    )
    return baseline.p50 / other.p50, interval
