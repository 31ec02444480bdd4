import numpy as np
import pytest

from qdeploy.affine import IntegerType, affine_from_limits, fake_quantize
from qdeploy.calibration_readers.mse import Mse, squared_error
from qdeploy.scheme import Scheme
from tests.contracts.reader_contract import SCHEMES, ReaderContract


class TestMse(ReaderContract):
    def reader(self):
        return Mse()


def symmetric(bits):
    return Scheme(IntegerType(bits), symmetric=True)


def asymmetric(bits):
    return Scheme(IntegerType(bits, signed=False), symmetric=False)


def error_of(values, scheme, low, high):
    """Mean squared error of the values themselves, quantized."""
    affine = affine_from_limits(low, high, scheme.integer, symmetric=scheme.symmetric)
    return float(np.mean(np.square(values.astype(np.float64) - fake_quantize(values, affine))))


RANDOM = np.random.default_rng(11)
NORMAL = RANDOM.standard_normal(200_000).astype(np.float32)
SAMPLES = {
    "normal": NORMAL,
    "laplace": RANDOM.laplace(size=200_000).astype(np.float32),
    "relu6": np.clip(3.0 * NORMAL, 0.0, 6.0),
    "skewed": RANDOM.gamma(2.0, size=200_000).astype(np.float32) - np.float32(0.5),
    "outlier": np.append(NORMAL, np.float32(100.0)),
}
each_sample = pytest.mark.parametrize("values", SAMPLES.values(), ids=SAMPLES)


@each_sample
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_no_other_threshold_has_a_smaller_error_on_the_samples_themselves(values, bits, statistics_of):
    scheme = symmetric(bits)

    found = Mse().range(statistics_of(values), scheme)

    peak = float(np.abs(values).max())
    least = min(error_of(values, scheme, -t, t) for t in np.geomspace(peak / 50, peak, 100))
    assert error_of(values, scheme, found.minimum, found.maximum) <= 1.01 * least


@pytest.mark.parametrize("name", ["normal", "skewed"])
@pytest.mark.parametrize("bits", [3, 8])
def test_no_other_pair_of_limits_has_a_smaller_error_on_the_samples_themselves(name, bits, statistics_of):
    scheme, values = asymmetric(bits), SAMPLES[name][:20_000]

    found = Mse().range(statistics_of(values), scheme)

    low, high = float(values.min()), float(values.max())
    pairs = [(low * a, high * b) for a in np.linspace(0.1, 1.0, 15) for b in np.linspace(0.1, 1.0, 20)]
    least = min(error_of(values, scheme, *pair) for pair in pairs)
    assert error_of(values, scheme, found.minimum, found.maximum) <= 1.02 * least


@pytest.mark.parametrize(("bits", "threshold"), [(4, 2.55), (5, 2.93), (6, 3.28), (7, 3.61), (8, 3.92)])
def test_limits_of_a_gaussian_are_near_the_published_ones(bits, threshold, statistics_of):
    # Banner et al. 2019 (arXiv 1810.05723), thresholds in σ; their rounding noise is an approximation for few bits.
    values = np.random.default_rng(5).standard_normal(1_000_000)

    found = Mse().range(statistics_of(values), asymmetric(bits))

    assert -found.minimum == pytest.approx(threshold, rel=0.03)
    assert found.maximum == pytest.approx(threshold, rel=0.03)


@pytest.mark.parametrize(("bits", "threshold"), [(4, 5.03), (8, 9.89)])
def test_limits_of_a_laplacian_are_near_the_published_ones(bits, threshold, statistics_of):
    values = np.random.default_rng(6).laplace(size=1_000_000)

    found = Mse().range(statistics_of(values), asymmetric(bits))

    assert found.maximum == pytest.approx(threshold, rel=0.05)


@pytest.mark.parametrize("scheme", [asymmetric(8), symmetric(8)], ids=["asymmetric", "symmetric"])
def test_peaks_at_zero_and_six_are_kept(scheme, statistics_of):
    found = Mse().range(statistics_of(SAMPLES["relu6"]), scheme)

    assert (found.minimum, found.maximum) == (0.0, 6.0)


def test_a_lone_outlier_that_costs_more_to_clip_than_to_keep_is_mostly_kept(statistics_of):
    found = Mse().range(statistics_of(SAMPLES["outlier"]), asymmetric(8))

    # One clipped value in 200,001 costs (100 − t)²/200,001, rounding costs (t + 3.9)²/(12·255²): least at t ≈ 78.
    assert found.maximum == pytest.approx(78.0, rel=0.05)


def test_an_outlier_among_many_values_is_clipped_at_few_bits(statistics_of):
    found = Mse().range(statistics_of(SAMPLES["outlier"]), asymmetric(4))

    assert found.maximum < 5.0


@pytest.mark.parametrize("name", ["uint8", "int8 symmetric", "int4 narrow symmetric", "uint4"])
@each_sample
def test_the_integrated_error_is_that_of_evenly_spread_values(values, name, statistics_of):
    bins, scheme = statistics_of(values).bins, SCHEMES[name]
    limits = np.array([0.3, 1.0]) * np.abs(values).max()
    affine = affine_from_limits(-limits, limits, scheme.integer, symmetric=scheme.symmetric)

    found = squared_error(bins, affine)

    spread = bins.low[:, None] + (bins.high - bins.low)[:, None] * (np.arange(1_000) + 0.5) / 1_000
    for error, scale, zero in zip(found, affine.scale.astype(float), affine.zero_point.astype(float), strict=True):
        quantized = np.clip(np.rint(spread / scale) + zero, scheme.integer.qmin, scheme.integer.qmax)
        expected = bins.count @ np.mean(np.square(spread - scale * (quantized - zero)), axis=1)
        assert error == pytest.approx(expected, rel=1e-4)
