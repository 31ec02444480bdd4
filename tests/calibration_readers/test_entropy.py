import numpy as np
import pytest

from qdeploy.affine import IntegerType
from qdeploy.calibration_readers.entropy import Entropy
from qdeploy.scheme import Scheme
from tests.contracts.reader_contract import ReaderContract


class TestEntropy(ReaderContract):
    def reader(self):
        return Entropy()


def symmetric(bits):
    return Scheme(IntegerType(bits, narrow=True), symmetric=True)


def asymmetric(bits):
    return Scheme(IntegerType(bits, signed=False), symmetric=False)


RANDOM = np.random.default_rng(21)
NORMAL = RANDOM.standard_normal(300_000).astype(np.float32)
SAMPLES = {
    "normal": NORMAL,
    "laplace": RANDOM.laplace(size=300_000).astype(np.float32),
    "heavy tails": RANDOM.standard_t(3, size=300_000).astype(np.float32),
    "relu": np.maximum(NORMAL, 0.0),
}
PLACES = 9


def divergence_of(values, bits, threshold):
    """KL(P‖Q) of a symmetric narrow quantization by its definition, place by place, from the values themselves."""
    from scipy.special import rel_entr

    values = np.sort(values[values != 0.0].astype(np.float64))
    qmax = 2 ** (bits - 1) - 1
    step = threshold / qmax
    reference, quantized = [], []
    for level in range(-qmax, qmax + 1):
        edges = step * (level + np.linspace(-0.5, 0.5, PLACES + 1))
        counts = np.diff(np.searchsorted(values, edges)).astype(float)
        observed = (edges[1:] > values[0]) & (edges[:-1] < values[-1])
        reference.extend(counts)
        quantized.extend(counts.sum() / max(observed.sum(), 1) * (counts > 0.0))
        # A place without values has no part in KL(P‖Q), but the mass that Q gives it is missing elsewhere.
    held = np.flatnonzero(reference)
    inside = sum(reference)
    reference[held[0]] += (values < -step * (qmax + 0.5)).sum()
    reference[held[-1]] += (values > step * (qmax + 0.5)).sum()
    return rel_entr(np.array(reference) / values.size, np.array(quantized) / inside).sum()


@pytest.mark.parametrize("values", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_no_other_threshold_loses_less_information(values, bits, statistics_of):
    found = Entropy().range(statistics_of(values), symmetric(bits))

    threshold = max(-found.minimum, found.maximum)
    candidates = np.geomspace(np.quantile(np.abs(values[values != 0.0]), 0.6), np.abs(values).max(), 80)
    divergences = [divergence_of(values, bits, t) for t in candidates]
    assert divergence_of(values, bits, threshold) <= 1.05 * min(divergences)


def test_eight_bits_keep_nearly_all_of_a_gaussian(statistics_of):
    for scheme in (symmetric(8), asymmetric(8)):
        found = Entropy().range(statistics_of(NORMAL), scheme)

        assert np.mean((found.minimum > NORMAL) | (found.maximum < NORMAL)) < 1e-4


def test_four_bits_clip_the_tails_of_a_gaussian(statistics_of):
    found = Entropy().range(statistics_of(NORMAL), asymmetric(4))

    assert 2.5 < found.maximum < 3.5
    assert 2.5 < -found.minimum < 3.5


def test_the_number_of_exact_zeros_does_not_matter(statistics_of):
    few = Entropy().range(statistics_of(SAMPLES["relu"]), asymmetric(8))
    many = Entropy().range(statistics_of(np.append(SAMPLES["relu"], np.zeros(3_000_000))), asymmetric(8))

    assert many == few


def test_a_peak_near_zero_does_not_draw_the_limits_in(statistics_of):
    peak = 1e-4 * NORMAL
    bulk = SAMPLES["laplace"]

    without = Entropy().range(statistics_of(bulk), asymmetric(8))
    found = Entropy().range(statistics_of(np.append(bulk, peak)), asymmetric(8))

    assert found.maximum > 0.8 * without.maximum
    assert found.minimum < 0.8 * without.minimum


def test_the_bound_of_relu6_is_kept(statistics_of):
    found = Entropy().range(statistics_of(np.clip(3.0 * NORMAL, 0.0, 6.0)), asymmetric(8))

    assert (found.minimum, found.maximum) == (0.0, 6.0)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_outlier_takes_no_resolution_from_the_rest(bits, statistics_of):
    found = Entropy().range(statistics_of(np.append(NORMAL, 1e4)), asymmetric(bits))

    assert 2.5 < found.maximum < 10.0


def test_sixteen_bits_are_not_clipped(statistics_of):
    found = Entropy().range(statistics_of(NORMAL), Scheme(IntegerType(16), symmetric=False))

    assert (found.minimum, found.maximum) == (NORMAL.min(), NORMAL.max())
