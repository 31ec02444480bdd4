"""The counting loop against plain numpy: compiled and not, with every kind of float32 there is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qdeploy import counting
from qdeploy.counting import (
    BINS,
    LANES,
    LIMBS,
    Tally,
    as_channels,
    is_finite,
    kernel,
    keys_of,
    tally_with_numpy,
    values_of,
)

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
ANY = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
ODD = [0.0, -0.0, 1e-45, -1e-45, 1.17e-38, 3.4e38, -3e38, np.inf, -np.inf, np.nan, 1.0, -2.5, 1 + 2**-23]
"""Both zeros, subnormals, masks, infinities."""
AXES = [None, 0, 1, 2, -1]

compiled = pytest.mark.parametrize("loop", [kernel(), tally_with_numpy], ids=["kernel", "numpy"])


def assert_equal(found, expected, scale=1.0):
    """All figures equal; channel sums to 1e-12 of `scale`, the sum of magnitudes."""
    np.testing.assert_array_equal(found.histogram, expected.histogram)
    assert found.non_finite == expected.non_finite
    np.testing.assert_array_equal(found.channel_count, expected.channel_count)
    np.testing.assert_array_equal(found.channel_minimum, expected.channel_minimum)
    np.testing.assert_array_equal(found.channel_maximum, expected.channel_maximum)
    total = found.channel_mean * np.maximum(found.channel_count, 1)
    wanted = expected.channel_mean * np.maximum(expected.channel_count, 1)
    np.testing.assert_allclose(total, wanted, rtol=0, atol=1e-12 * scale + 1e-17)


def tallied(parts, axis, channels):
    tally = Tally("x", axis, channels)
    for part in parts:
        tally.add(part)
    return tally.statistics()


def channels_of(values, axis):
    return 1 if axis is None else values.shape[axis]


@compiled
@pytest.mark.parametrize("axis", AXES)
def test_figures_equal_numpys_on_all_samples_together(monkeypatch, statistics_of, loop, axis):
    monkeypatch.setattr(counting, "kernel", lambda: loop)
    random = np.random.default_rng(1)
    parts = [random.normal(size=(3, 5, 7)).astype(np.float32) for _ in range(4)]

    found = tallied(parts, axis, channels_of(parts[0], axis))

    whole = np.concatenate(parts, axis=2 if axis in (0, 1) else 1 if axis in (2, -1) else 0)
    others = None if axis is None else tuple(i for i in range(3) if i != axis % 3)
    assert_equal(found, statistics_of(whole, "x", axis), scale=float(np.abs(whole).sum()))
    np.testing.assert_array_equal(found.histogram, np.bincount(whole.ravel().view(np.uint32) >> 17, minlength=BINS))
    np.testing.assert_array_equal(found.channel_minimum, np.ravel(whole.min(axis=others)))
    np.testing.assert_array_equal(found.channel_maximum, np.ravel(whole.max(axis=others)))
    np.testing.assert_allclose(found.channel_mean, np.ravel(whole.mean(axis=others, dtype=np.float64)), rtol=1e-12)


@compiled
@settings(max_examples=60, deadline=None)
@given(
    values=arrays.arrays(np.float32, st.tuples(*[st.integers(1, 6)] * 3), elements=ANY | st.sampled_from(ODD)),
    axis=st.sampled_from(AXES),
)
def test_any_floats_count_as_in_numpy(statistics_of, loop, values, axis):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "kernel", lambda: loop)
        found = tallied([values], axis, channels_of(values, axis))

    magnitudes = np.abs(np.where(np.isfinite(values), values, 0).astype(np.float64)).sum()
    assert_equal(found, statistics_of(values, "x", axis), scale=float(magnitudes))


@settings(max_examples=60, deadline=None)
@given(
    values=arrays.arrays(
        np.float32, arrays.array_shapes(min_dims=4, max_dims=4, max_side=9), elements=ANY | st.sampled_from(ODD)
    )
)
def test_the_compiled_loop_is_the_numpy_loop(values):
    channels = values.shape[1] * values.shape[3]

    def counted(loop):
        table = np.zeros((BINS, LANES), np.int32)
        low = np.full(channels, 2**31 - 1, np.int32)
        high = np.full(channels, -(2**31), np.int32)
        limbs = np.zeros((channels, LIMBS), np.int64)
        extremes = loop(values, values.view(np.int32), table, low, high, limbs)
        return extremes, table.sum(axis=1), low, high, [exact(row) for row in limbs]

    numba, numpy = counted(kernel()), counted(tally_with_numpy)

    keys = keys_of(values)
    assert tuple(numba[0]) == numpy[0] == (keys.min(), keys.max())
    assert is_finite(*numpy[0]) == bool(np.isfinite(values).all())
    for one, other in zip(numba[1:4], numpy[1:4], strict=True):
        np.testing.assert_array_equal(one, other)
    magnitude = np.abs(np.where(np.isfinite(values), values, 0).astype(np.float64)).sum(axis=(0, 2)).ravel()
    for one, other, scale in zip(numba[4], numpy[4], magnitude, strict=True):
        assert abs(one - other) <= 1e-12 * scale + 1e-17


def exact(limbs):
    """A fixed-point sum as a Python number."""
    return float(sum(int(limb) << 48 * k for k, limb in enumerate(limbs))) * 2.0**-60


@given(values=arrays.arrays(np.float32, st.integers(1, 30), elements=FINITE | st.sampled_from([np.inf, -np.inf])))
def test_keys_are_ordered_as_the_floats_and_lead_back(values):
    keys = keys_of(values)

    np.testing.assert_array_equal(values_of(keys).view(np.uint32), values.view(np.uint32))
    np.testing.assert_array_equal(values[np.argsort(keys, kind="stable")], np.sort(values))


def test_negative_zero_lies_below_zero():
    low, high = keys_of(np.array([-0.0, 0.0], np.float32))

    assert low < high


def test_what_is_not_finite_is_left_out_channel_by_channel(statistics_of):
    values = np.array([[1.0, np.nan, -3e38], [np.inf, -np.inf, np.nan], [-0.0, 1e-45, 5.0]], np.float32)
    before = np.full((3, 3), 2.0, np.float32)

    found = tallied([before, values, before], 0, 3)

    assert found.non_finite == 4
    assert found.channel_count.tolist() == [8, 6, 9]
    assert found.channel_minimum.tolist() == [np.float32(-3e38), 2.0, 0.0]
    assert found.channel_maximum.tolist() == [2.0, 2.0, 5.0]
    assert_equal(found, statistics_of(np.concatenate([before, values, before], axis=1), "x", 0), scale=3e38)


def test_a_channel_that_never_held_a_finite_value():
    found = tallied([np.array([[np.nan, 1.0]], np.float32)], 1, 2)

    assert found.channel_minimum.tolist() == [np.inf, 1.0]
    assert found.channel_maximum.tolist() == [-np.inf, 1.0]
    assert found.channel_mean.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 4, 0)])
def test_empty_tensors_leave_nothing(shape):
    found = tallied([np.zeros(shape, np.float32)], None, 1)

    assert (found.count, found.non_finite, found.minimum, found.maximum) == (0, 0, 0.0, 0.0)


def test_an_empty_sample_among_others(statistics_of):
    full = np.arange(8, dtype=np.float32).reshape(2, 4)

    assert_equal(tallied([np.zeros((0, 4), np.float32), full], -1, 4), statistics_of(full, "x", -1))


@pytest.mark.parametrize("limit", [1, 7, 100])
def test_emptying_the_narrow_tables_loses_nothing(monkeypatch, statistics_of, limit):
    monkeypatch.setattr(counting, "FLUSH_AFTER", limit)
    random = np.random.default_rng(2)
    parts = [random.normal(size=(2, 3)).astype(np.float32) for _ in range(50)]

    found = tallied(parts, 1, 3)

    whole = np.concatenate(parts)
    assert_equal(found, statistics_of(whole, "x", 1), scale=float(np.abs(whole).sum()))


def test_many_large_sums_carry(statistics_of):
    value = np.float32(-1e30)
    tally = Tally("x", None, 1)
    part = np.full(3, value, np.float32)
    times = (1 << 14) + 5
    for _ in range(times):
        tally.add(part)

    found = tally.statistics()

    assert found.count == 3 * times
    np.testing.assert_allclose(found.channel_mean, [float(value)], rtol=1e-12)


def test_a_large_mask_does_not_overflow_the_sums():
    lowest = np.finfo(np.float32).min
    mask = np.full((1, 2, 1 << 17), lowest, np.float32)

    found = tallied([mask, mask], 1, 2)

    np.testing.assert_allclose(found.channel_mean, [lowest, lowest], rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_other_floats_count_as_float32(statistics_of, dtype):
    values = np.linspace(-3, 3, 24).reshape(2, 3, 4).astype(dtype)

    found = tallied([values], 1, 3)

    assert_equal(found, statistics_of(values.astype(np.float32), "x", 1), scale=100.0)


def test_a_transposed_view_counts_by_its_own_axes(statistics_of):
    values = np.random.default_rng(4).normal(size=(4, 3, 2)).astype(np.float32).transpose(2, 1, 0)

    assert_equal(tallied([values], 1, 3), statistics_of(values, "x", 1), scale=100.0)


@given(shape=arrays.array_shapes(min_dims=1, max_dims=4, max_side=4), data=st.data())
def test_channels_stand_in_the_middle(shape, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)

    found = as_channels(values, axis)

    assert found.shape[1] * found.shape[3] == shape[axis]
    for channel in range(shape[axis]):
        group, member = divmod(channel, found.shape[3])
        np.testing.assert_array_equal(found[:, group, :, member].ravel(), values.take(channel, axis).ravel())


def in_blocks(values, block):
    """Memory as [N, C / block, H, W, block], under the shape [N, C, H, W]."""
    n, c, *size = values.shape
    return np.ascontiguousarray(np.moveaxis(values.reshape(n, c // block, block, *size), 2, -1)).reshape(values.shape)


@compiled
@settings(max_examples=40, deadline=None)
@given(block=st.sampled_from([2, 8, 16]), seed=st.integers(0, 999), sizes=st.tuples(*[st.integers(1, 11)] * 3))
def test_channels_in_blocks_count_as_those_in_order(statistics_of, loop, block, seed, sizes):
    batch, height, width = sizes
    values = np.random.default_rng(seed).normal(size=(batch, 3 * block, height, width)).astype(np.float32)
    values.reshape(-1)[seed % values.size] = ODD[seed % len(ODD)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "kernel", lambda: loop)
        tally = Tally("x", 1, 3 * block, block)
        tally.add(in_blocks(values, block))

    magnitudes = np.abs(np.where(np.isfinite(values), values, 0).astype(np.float64)).sum()
    assert_equal(tally.statistics(), statistics_of(values, "x", 1), scale=float(magnitudes))


def test_without_numba_the_numpy_loop_counts(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "qdeploy.counting_numba", None)
    kernel.cache_clear()
    try:
        assert kernel() is tally_with_numpy
    finally:
        kernel.cache_clear()
