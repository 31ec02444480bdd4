from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from qdeploy.parity.bootstrap import paired_interval, percentile_interval


def test_agrees_with_scipy_on_real_valued_scores():
    from scipy import stats

    rng = np.random.default_rng(1)
    reference = rng.normal(0.7, 0.2, 300)
    scores = reference - rng.normal(0.05, 0.1, 300)

    low, high = paired_interval(reference, scores)

    drops = (reference - scores,)
    expected = stats.bootstrap(drops, np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(2))
    width = expected.confidence_interval.high - expected.confidence_interval.low
    assert low == pytest.approx(expected.confidence_interval.low, abs=0.05 * width)
    assert high == pytest.approx(expected.confidence_interval.high, abs=0.05 * width)


def test_agrees_with_scipy_on_hits_and_misses_at_another_confidence():
    from scipy import stats

    rng = np.random.default_rng(3)
    reference = (rng.random(400) < 0.88).astype(np.float64)
    scores = np.where(rng.random(400) < 0.1, 1.0 - reference, reference)

    low, high = paired_interval(reference, scores, confidence=0.8)

    expected = stats.bootstrap(
        (reference - scores,),
        np.mean,
        confidence_level=0.8,
        n_resamples=5000,
        method="percentile",
        rng=np.random.default_rng(4),
    )
    # A mean of hits and misses moves in steps of 1/400, and so do the quantiles.
    assert low == pytest.approx(expected.confidence_interval.low, abs=0.0026)
    assert high == pytest.approx(expected.confidence_interval.high, abs=0.0026)


def test_covers_the_true_drop_as_often_as_it_claims():
    rng = np.random.default_rng(5)
    trials, covered = 400, 0
    for _ in range(trials):
        reference = (rng.random(150) < 0.9).astype(np.float64)
        # The other model loses 20 % of the hits and gains nothing: the true drop is 0.9 · 0.2.
        scores = reference * (rng.random(150) >= 0.2)
        low, high = paired_interval(reference, scores, resamples=400)
        covered += low <= 0.18 <= high

    # Four standard errors of a share of 0.95 among 400, and the known shortfall of the method on small samples.
    assert covered / trials == pytest.approx(0.95, abs=0.05)


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(6)
    reference = rng.normal(0.0, 10.0, 200)
    scores = reference - rng.normal(0.1, 0.01, 200)

    low, high = paired_interval(reference, scores)

    assert 0.09 < low < high < 0.11


def test_agrees_with_scipy_on_a_figure_that_is_no_mean():
    from scipy import stats

    def spread(rows):
        return rows.std(axis=1)

    rng = np.random.default_rng(8)
    reference = rng.normal(0.0, 1.2, 300)
    scores = reference + rng.normal(0.0, 0.3, 300)

    low, high = paired_interval(reference, scores, spread)

    expected = stats.bootstrap(
        (reference, scores),
        lambda a, b, axis: a.std(axis) - b.std(axis),
        paired=True,
        n_resamples=5000,
        method="percentile",
        rng=np.random.default_rng(9),
    ).confidence_interval
    width = expected.high - expected.low
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.05 * width)


def test_equal_scores_give_zero():
    scores = np.array([1.0, 0.0, 1.0])

    assert paired_interval(scores, scores) == (0.0, 0.0)


def test_one_item_gives_its_own_drop():
    assert paired_interval(np.array([1.0]), np.array([0.25])) == (0.75, 0.75)


def test_a_constant_drop_has_no_width():
    assert paired_interval(np.full(50, 0.75), np.full(50, 0.5)) == (0.25, 0.25)


def test_equal_seeds_give_equal_intervals():
    rng = np.random.default_rng(7)
    reference, scores = rng.random(100), rng.random(100)

    assert paired_interval(reference, scores) == paired_interval(reference, scores)
    assert paired_interval(reference, scores) != paired_interval(reference, scores, seed=1)


def test_every_resample_is_drawn_also_when_they_do_not_fit_at_once():
    drawn = 0

    def count(indices):
        nonlocal drawn
        drawn += indices.shape[0]
        assert indices.shape[1] == 300_000
        return np.zeros(indices.shape[0])

    percentile_interval(count, 300_000, resamples=10)

    assert drawn == 10


def test_memory_stays_bounded_whatever_the_number_of_items():
    reference, scores = np.ones(50_000), np.zeros(50_000)
    tracemalloc.start()
    paired_interval(reference, scores, resamples=100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    # All draws at once would take 100 · 50,000 · 16 bytes = 80 MB.
    assert peak < 40e6
