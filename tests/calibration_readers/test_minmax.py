import numpy as np
import pytest

from qdeploy.affine import Range
from qdeploy.calibration_readers.minmax import MinMax
from tests.contracts.reader_contract import SCHEMES, ReaderContract


class TestMinMax(ReaderContract):
    def reader(self):
        return MinMax()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_takes_the_exact_extremes_under_every_scheme(scheme, statistics_of):
    values = np.float32([-0.1, 0.3, 1e-9, 12.345])

    found = MinMax().range(statistics_of(values), scheme)

    assert found == Range(float(values[0]), float(values[3]))
