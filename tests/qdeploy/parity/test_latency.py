from __future__ import annotations

from collections import Counter

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
        def run():
            self.calls.append(name)
            self.now += int(ms * 1e6)

        return run

    def measure(self, **options):
        return measure(self.runs, clock_ns=lambda: self.now, **options)


def test_times_each_model_apart():
    latencies = Machine(slow=8, fast=2).measure(rounds=50, budget_s=100)

    assert latencies == {"slow": Latency((8.0,) * 50), "fast": Latency((2.0,) * 50)}


def test_warms_up_uncounted():
    machine = Machine(a=1, b=1)

    latencies = machine.measure(warmup=5, rounds=30, budget_s=100)

    assert len(machine.calls) == 2 * 35
    assert latencies["a"].runs == 30


def test_stops_at_the_time_budget():
    machine = Machine(a=10, b=30)

    latencies = machine.measure(warmup=5, rounds=1000, budget_s=2.0)

    # A round takes 40 ms: 50 rounds in two seconds, 5 of them warm-up.
    assert latencies["a"].runs == latencies["b"].runs == 45


@pytest.mark.parametrize("options", [{"budget_s": 0.0}, {"budget_s": 100.0, "rounds": 3}])
def test_never_counts_fewer_than_twenty_rounds(options):
    assert Machine(a=500).measure(**options)["a"].runs == 20


@pytest.mark.parametrize("names", ["ab", "abc", "abcd"])
def test_no_model_always_follows_the_same_one(names):
    machine = Machine(**dict.fromkeys(names, 1))
    machine.measure(warmup=0, rounds=120, budget_s=100)

    rounds = [machine.calls[start : start + len(names)] for start in range(0, len(machine.calls), len(names))]
    assert all(sorted(each) == list(names) for each in rounds)
    for name in names:
        followed = Counter(
            before for before, after in zip(machine.calls, machine.calls[1:], strict=False) if after == name
        )
        assert max(followed.values()) <= 0.75 * followed.total()
        positions = Counter(each.index(name) for each in rounds)
        assert len(positions) == len(names)


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
