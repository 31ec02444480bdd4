"""The digest of a sample, and the warnings about a set of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.samples.warnings import practice_warnings, sample_digest

X = np.arange(6, dtype=np.float32).reshape(2, 3)
MANY = [str(i) for i in range(500)]


def test_a_digest_is_16_bytes_and_knows_no_order_of_names_or_memory():
    digest = sample_digest({"a": X, "b": X[:1]})

    assert len(bytes.fromhex(digest)) == 16
    assert digest == sample_digest({"b": X[:1].copy(), "a": np.asfortranarray(X)})


@pytest.mark.parametrize(
    "other",
    [
        {"b": X},
        {"a": X + 1},
        {"a": X.reshape(3, 2)},
        {"a": X.view(np.int32)},
        {"a": X, "b": X},
        {},
    ],
)
def test_every_part_of_a_sample_counts(other):
    assert sample_digest(other) != sample_digest({"a": X})


@given(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(["float16", "int64", "bool", "complex64"]))
def test_arrays_of_any_shape_and_dtype_have_a_digest(shape, dtype):
    x = np.ones(shape, dtype)

    assert sample_digest({"x": x}) == sample_digest({"x": x.copy()})


@pytest.mark.parametrize(
    ("digests", "labels", "expected"),
    [
        (MANY, None, ()),
        (MANY, [], ()),
        (MANY, [0, 1] * 250, ()),
        (MANY[:100], None, ()),
        (MANY[:99], None, ("99 calibration samples; 500–2,000 diverse ones are usual.",)),
        ([*MANY, "0", "0", "1"], None, ("3 of 503 calibration samples repeat others.",)),
        (MANY, [3] * 500, ("All calibration samples are of one class, 3.",)),
    ],
)
def test_what_is_unusual_is_told(digests, labels, expected):
    assert practice_warnings(digests, labels) == expected
