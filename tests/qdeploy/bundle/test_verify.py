"""What counts as a wrong answer."""

import numpy as np
import pytest

from qdeploy.bundle.golden import GoldenSample
from qdeploy.bundle.replay import distance
from qdeploy.bundle.verify import allowed

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("found", "expected", "most"),
    [
        ([1.0, 2.5], [1.0, 2.0], 0.5),
        ([NAN, -INF], [NAN, -INF], 0.0),
        ([NAN], [1.0], INF),
        ([INF], [-INF], INF),
        ([1.0], [1.0, 1.0], INF),
        ([], [], 0.0),
    ],
)
def test_the_distance_of_two_arrays(found, expected, most):
    assert distance(np.array(found, np.float32), np.array(expected, np.float32)) == most


def golden(ours, float32):
    return GoldenSample({}, {"ort-cpu": {"y": np.array(ours)}, "float": {"y": np.array(float32)}})


def test_an_answer_may_be_as_far_off_as_quantization_moved_the_golden_outputs():
    samples = [golden([1.0, 2.0], [1.25, 2.0]), golden([3.0, 4.0], [3.0, 3.5])]

    assert allowed(samples, "ort-cpu") == {"y": 0.5}


def test_what_was_not_quantized_may_differ_by_rounding():
    assert allowed([golden([-200.0, 4.0], [-200.0, 4.0])], "ort-cpu") == {"y": pytest.approx(0.002)}


def test_a_golden_output_that_is_not_finite_allows_nothing():
    samples = [golden([NAN, 2.0], [1.0, 2.0]), golden([3.0, 4.0], [3.0, 3.5])]

    assert allowed(samples, "ort-cpu") == {"y": 0.5}
