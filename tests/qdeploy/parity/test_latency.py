from __future__ import annotations

from collections import Counter
from itertools import count, groupby, pairwise

import numpy as np
import pytest

from qdeploy.errors import InternalError
from qdeploy.parity.latency import Latency, measure, speedup


class Machine:
    """Models that take known times on a clock of our own."""

    def __init__(self, **milliseconds):
        self.now = 0
        self.calls = []
        self.runs = {name: self._model(name, ms) for name, ms in milliseconds.items()}

    def _model(self, name, ms):
        return lambda: self.spend(name, ms)

    def spend(self, name, ms):
        self.calls.append(name)
        self.now += int(ms * 1e6)

    def slow_first(self, name, first_ms, ms):
        """A model that is slow just when another ran before it."""
        return lambda: self.spend(name, ms if self.calls[-1:] == [name] else first_ms)

    def measure(self, **options):
        return measure(self.runs, clock_ns=lambda: self.now, **options)


def bursts(calls):
    """The calls as (model, runs in a row)."""
    return [(name, len(list(group))) for name, group in groupby(calls)]


def test_times_each_model_apart():
    latencies = Machine(slow=8, fast=2).measure(rounds=10, budget_s=100)

    assert latencies == {"slow": Latency((8.0,) * 50), "fast": Latency((2.0,) * 50)}


def test_the_first_run_of_a_burst_is_not_counted():
    machine = Machine(cached=3, other=1)
    machine.runs["cached"] = machine.slow_first("cached", 50, 3)

    latencies = machine.measure(warmup=0, rounds=10, budget_s=100)

    assert latencies["cached"] == Latency((3.0,) * 50)
    assert machine.calls.count("cached") == 60


def test_the_times_are_in_the_order_measured():
    machine = Machine(a=1)
    ticks = count(1)
    machine.runs["a"] = lambda: machine.spend("a", next(ticks))

    latency = machine.measure(warmup=1, rounds=4, budget_s=100)["a"]

    # Each burst of six loses its first run, and the first burst is warm-up.
    expected = [run for burst in range(1, 5) for run in range(6 * burst + 2, 6 * burst + 7)]
    assert latency.times_ms == tuple(map(float, expected))


def test_warms_up_uncounted():
    machine = Machine(a=1, b=1)

    latencies = machine.measure(warmup=5, rounds=30, budget_s=100)

    assert Counter(machine.calls) == {"a": 6 * 35, "b": 6 * 35}
    assert latencies["a"].runs == latencies["b"].runs == 150


def test_stops_at_the_time_budget():
    machine = Machine(a=10, b=30)

    latencies = machine.measure(warmup=5, rounds=1000, budget_s=2.4)

    # A round is a burst of six runs of each, 240 ms: ten rounds fit, five of them warm-up.
    assert machine.now == 2_400_000_000
    assert latencies["a"].runs == latencies["b"].runs == 25


@pytest.mark.parametrize("options", [{"budget_s": 0.0}, {"budget_s": 100.0, "rounds": 3}])
def test_never_counts_fewer_than_twenty_runs(options):
    assert Machine(a=500).measure(**options)["a"].runs == 20


@pytest.mark.parametrize("names", ["ab", "abc", "abcd"])
def test_no_model_always_follows_the_same_one(names):
    machine = Machine(**dict.fromkeys(names, 1))
    machine.measure(warmup=0, rounds=120, budget_s=100)

    # Where a model ends one round and begins the next, its two bursts of six stand side by side.
    order = [name for name, runs in bursts(machine.calls) for _ in range(runs // 6)]
    rounds = [order[start : start + len(names)] for start in range(0, len(order), len(names))]
    assert len(machine.calls) == 6 * 120 * len(names)
    assert all(sorted(each) == list(names) for each in rounds)
    for name in names:
        followed = Counter(before for before, after in pairwise(order) if after == name)
        assert max(followed.values()) <= 0.75 * followed.total()
        assert len({each.index(name) for each in rounds}) == len(names)


def test_percentiles():
    latency = Latency(tuple(float(ms) for ms in range(1, 102)))

    assert (latency.p50, latency.p90, latency.p99, latency.runs) == (51.0, 91.0, 100.0, 101)


def test_the_speed_up_is_the_ratio_of_medians():
    ratio, interval = speedup(Latency((6.0,) * 20), Latency((2.0,) * 20))

    assert (ratio, interval) == (3.0, (3.0, 3.0))


def test_its_interval_agrees_with_scipy():
    from scipy import stats

    rng = np.random.default_rng(0)
    load = rng.gamma(4.0, 0.5, 120)
    slow, fast = 10 + load + rng.normal(0, 0.3, 120), 5 + load / 2 + rng.normal(0, 0.3, 120)

    ratio, (low, high) = speedup(Latency(tuple(slow)), Latency(tuple(fast)))

    expected = stats.bootstrap(
        (slow, fast),
        lambda a, b, axis: np.median(a, axis=axis) / np.median(b, axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert ratio == np.median(slow) / np.median(fast)
    assert low == pytest.approx(expected.low, abs=0.02)
    assert high == pytest.approx(expected.high, abs=0.02)
    assert low < ratio < high


def test_latencies_of_different_measurements_are_not_divided():
    with pytest.raises(InternalError, match="21 and 20 runs"):
        speedup(Latency((1.0,) * 21), Latency((1.0,) * 20))
