import numpy as np
import pytest

from qdeploy.calibration_readers.percentile import Percentile
from qdeploy.errors import InputError
from tests.contracts.reader_contract import SCHEMES, ReaderContract

ASYMMETRIC, SYMMETRIC = SCHEMES["uint8"], SCHEMES["int8 symmetric"]
WIDTH = 2**-6
"""Widest bin, relative to its values."""


class TestPercentile(ReaderContract):
    def reader(self):
        return Percentile()


class TestLowPercentile(ReaderContract):
    def reader(self):
        return Percentile(60.0)


SAMPLES = {
    "normal": np.random.default_rng(1).standard_normal(100_003).astype(np.float32),
    "skewed": np.random.default_rng(2).gamma(0.5, size=100_003).astype(np.float32) - np.float32(0.25),
    "heavy tails": np.random.default_rng(3).standard_t(2, size=100_003).astype(np.float32),
}
each_sample = pytest.mark.parametrize("values", SAMPLES.values(), ids=SAMPLES)
each_percentile = pytest.mark.parametrize("percentile", [60.0, 90.0, 99.0, 99.9, 99.99])


def assert_is_quantile(limit, values, share):
    lower, higher = (float(np.quantile(values, share, method=method)) for method in ("lower", "higher"))
    assert min(lower * (1 - WIDTH), lower * (1 + WIDTH)) <= limit <= max(higher * (1 - WIDTH), higher * (1 + WIDTH))


@each_sample
@each_percentile
def test_asymmetric_limits_are_the_quantiles_that_leave_half_the_rest_on_each_side(values, percentile, statistics_of):
    found = Percentile(percentile).range(statistics_of(values), ASYMMETRIC)

    assert_is_quantile(-found.minimum, -values, (100 + percentile) / 200)
    assert_is_quantile(found.maximum, values, (100 + percentile) / 200)


@each_sample
@each_percentile
def test_symmetric_limit_is_the_quantile_of_the_magnitudes(values, percentile, statistics_of):
    found = Percentile(percentile).range(statistics_of(values), SYMMETRIC)

    assert_is_quantile(max(-found.minimum, found.maximum), np.abs(values), percentile / 100)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@each_sample
def test_a_hundred_percent_is_the_observed_extremes(values, scheme, statistics_of):
    found = Percentile(100.0).range(statistics_of(values), scheme)

    assert (found.minimum, found.maximum) == (values.min(), min(values.max(), np.abs(values).max()))


def test_an_outlier_does_not_coarsen_the_quantile(statistics_of):
    values = np.append(SAMPLES["normal"], 1e6)

    found = Percentile(99.0).range(statistics_of(values), ASYMMETRIC)

    assert found.maximum == pytest.approx(np.quantile(values, 0.995), rel=WIDTH)


@pytest.mark.parametrize("percentile", [50.0, 0.9999, 100.1, -1.0, float("nan")])
def test_a_percentile_out_of_bounds_is_refused(percentile):
    with pytest.raises(InputError) as caught:
        Percentile(percentile)

    assert str(caught.value) == (
        f"The percentile {percentile} is not above 50 and at most 100. "
        "Give the percentage of values to keep, for example 99.99."
    )
