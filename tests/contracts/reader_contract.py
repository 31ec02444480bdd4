"""What every calibration reader owes its users. Subclass `ReaderContract` and say how to make the reader."""

import numpy as np
import pytest

from qdeploy.affine import IntegerType, affine_from_limits
from qdeploy.reader import CalibrationReader
from qdeploy.scheme import Scheme

SCHEMES = {
    "uint8": Scheme(IntegerType(8, signed=False), symmetric=False),
    "int8": Scheme(IntegerType(8), symmetric=False),
    "int8 symmetric": Scheme(IntegerType(8), symmetric=True),
    "int4 narrow symmetric": Scheme(IntegerType(4, narrow=True), symmetric=True),
    "uint4": Scheme(IntegerType(4, signed=False), symmetric=False),
    "int16": Scheme(IntegerType(16), symmetric=False),
}


def tensors():
    random = np.random.default_rng(7)
    normal = random.standard_normal(20_000)
    return {
        "normal": normal,
        "relu": np.maximum(normal, 0.0),
        "relu6": np.clip(3.0 * normal, 0.0, 6.0),
        "negative": -1.0 - np.abs(normal),
        "far from zero": 100.0 + normal,
        "laplace": random.laplace(size=20_000),
        "outlier": np.append(normal, 1e4),
        "two values": np.array([-1.0, 3.0]),
        "one value": np.array([2.5]),
        "constant": np.full(100, -0.75),
        "zeros": np.zeros(100),
        "tiny": normal * 1e-30,
        "huge": normal * 1e30,
        "infinities": np.append(normal, [np.inf, -np.inf, np.nan]),
        "nothing finite": np.array([np.nan, np.inf]),
        "empty": np.array([]),
    }


TENSORS = tensors()
each_tensor = pytest.mark.parametrize("values", TENSORS.values(), ids=TENSORS)
each_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


class ReaderContract:
    def reader(self) -> CalibrationReader:
        """The reader under test."""
        raise NotImplementedError

    def test_is_a_calibration_reader_that_needs_no_argument(self):
        assert isinstance(self.reader(), CalibrationReader)
        assert isinstance(type(self.reader())(), CalibrationReader)

    @each_scheme
    @each_tensor
    def test_range_contains_zero_and_stays_within_the_observed_extremes(self, values, scheme, statistics_of):
        statistics = statistics_of(values)

        found = self.reader().range(statistics, scheme)

        assert min(statistics.minimum, 0.0) <= found.minimum <= 0.0 <= found.maximum <= max(statistics.maximum, 0.0)

    @each_scheme
    @each_tensor
    def test_range_gives_a_usable_scale(self, values, scheme, statistics_of):
        found = self.reader().range(statistics_of(values), scheme)

        affine = affine_from_limits(found.minimum, found.maximum, scheme.integer, symmetric=scheme.symmetric)

        assert np.isfinite(affine.scale)
        assert affine.scale > 0.0

    @each_scheme
    @pytest.mark.parametrize("name", ["normal", "relu", "relu6", "laplace", "outlier", "two values", "constant"])
    def test_doubled_values_double_the_range(self, name, scheme, statistics_of):
        once = self.reader().range(statistics_of(TENSORS[name]), scheme)
        twice = self.reader().range(statistics_of(2.0 * TENSORS[name]), scheme)

        assert (twice.minimum, twice.maximum) == (2.0 * once.minimum, 2.0 * once.maximum)

    @each_scheme
    def test_a_constant_is_not_clipped(self, scheme, statistics_of):
        found = self.reader().range(statistics_of(np.full(100, -0.75)), scheme)

        assert found.minimum == -0.75

    @each_scheme
    def test_merged_statistics_give_the_range_of_all_values(self, scheme, statistics_of):
        values = TENSORS["laplace"]
        merged = statistics_of(values[5_000:]).merge(statistics_of(values[:5_000]))

        assert self.reader().range(merged, scheme) == self.reader().range(statistics_of(values), scheme)

    @each_scheme
    def test_reading_twice_gives_the_same(self, scheme, statistics_of):
        statistics, reader = statistics_of(TENSORS["normal"]), self.reader()

        assert reader.range(statistics, scheme) == reader.range(statistics, scheme)
