from dataclasses import fields, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdeploy.errors import InputError, InternalError
from qdeploy.statistics import LIMBS, Statistics, carry, fixed_point, real

STEP = 2.0**-60
sums = st.floats(-1e40, 1e40).map(np.float64)
float32s = st.floats(width=32, allow_nan=True, allow_infinity=True)
samples = st.lists(float32s, max_size=30).map(lambda x: np.array(x, np.float32))


def exact(limbs):
    """The number that limbs stand for, as a fraction."""
    return sum(Fraction(int(limb)) * Fraction(2) ** (48 * k - 60) for k, limb in enumerate(limbs))


def assert_equal(left, right):
    for field in fields(left):
        np.testing.assert_array_equal(getattr(left, field.name), getattr(right, field.name))


@given(value=sums)
def test_fixed_point_truncates_at_its_step(value):
    limbs = fixed_point(np.array(value))

    steps = int(Fraction(float(value)) / Fraction(STEP))
    assert exact(limbs) == steps * Fraction(STEP)
    assert (np.abs(limbs[:-1]) < 2**48).all()


@given(value=sums)
def test_fixed_point_comes_back_as_the_same_number(value):
    for limbs in (fixed_point(np.array(value)), carry(fixed_point(np.array(value)))):
        assert real(limbs) == pytest.approx(float(value), rel=2**-52, abs=STEP)


@given(limbs=st.lists(st.integers(-(2**61), 2**61), min_size=LIMBS, max_size=LIMBS))
def test_carry_keeps_the_sum_and_is_canonical(limbs):
    carried = carry(np.array(limbs, np.int64))

    assert exact(carried) == exact(limbs)
    assert all(0 <= limb < 2**48 for limb in carried[:-1])
    assert real(carried) == pytest.approx(float(exact(limbs)), rel=2**-51, abs=STEP)


@given(values=st.lists(sums, min_size=1, max_size=8), data=st.data())
def test_sums_in_any_order_are_the_same_to_the_bit(values, data):
    shuffled = data.draw(st.permutations(values))

    def total(numbers):
        result = fixed_point(np.array(0.0))
        for number in numbers:
            result = carry(result + fixed_point(np.array(number)))
        return result

    np.testing.assert_array_equal(total(values), total(shuffled))


@given(parts=st.tuples(samples, samples, samples))
def test_merging_is_associative_and_commutative_to_the_bit(parts, statistics_of):
    a, b, c = map(statistics_of, parts)

    assert_equal(a.merge(b), b.merge(a))
    assert_equal(a.merge(b).merge(c), a.merge(b.merge(c)))


@given(parts=st.lists(samples, min_size=1, max_size=4))
def test_merged_parts_are_the_whole(parts, statistics_of):
    merged = statistics_of(parts[0])
    for part in parts[1:]:
        merged = merged.merge(statistics_of(part))

    whole = np.concatenate(parts).astype(np.float64)
    finite = whole[np.isfinite(whole)]
    assert merged.count == finite.size
    assert merged.non_finite == whole.size - finite.size
    assert merged.histogram.sum() == finite.size
    assert (merged.minimum, merged.maximum) == ((finite.min(), finite.max()) if finite.size else (0.0, 0.0))
    # Each part's sum is rounded to float64 once.
    assert merged.channel_mean == pytest.approx(
        finite.mean() if finite.size else 0.0, rel=1e-9, abs=1e-9 * _size(finite)
    )


def _size(values):
    return float(np.abs(values).max(initial=0.0)) + 1e-9


def test_means_follow_the_channels(statistics_of):
    x = np.random.default_rng(0).standard_normal((4, 3, 5)).astype(np.float32) - 2.0
    x[:, 2] = np.nan

    found = statistics_of(x, channel_axis=1).channel_mean

    assert found == pytest.approx([x[:, 0].mean(dtype=float), x[:, 1].mean(dtype=float), 0.0])


def test_statistics_of_different_tensors_are_not_merged(statistics_of):
    x = np.ones((2, 3), np.float32)

    with pytest.raises(InternalError, match="statistics of different tensors cannot be merged: 'a' and 'b'"):
        statistics_of(x, "a").merge(statistics_of(x, "b"))
    with pytest.raises(InternalError):
        statistics_of(x).merge(statistics_of(x, channel_axis=1))


@given(values=samples)
@pytest.mark.filterwarnings("error")
def test_bins_ascend_and_cover_exactly_the_values(values, statistics_of):
    statistics = statistics_of(values)

    bins = statistics.bins

    finite = np.sort(values[np.isfinite(values)]).astype(np.float64)
    assert bins.count.sum() == finite.size
    assert (bins.count > 0).all()
    assert (bins.low <= bins.high).all()
    assert (bins.high[:-1] <= bins.low[1:]).all()
    # Sorted values and ascending bins: value i lies in the bin that holds the i-th count.
    holder = np.repeat(np.arange(bins.count.size), bins.count)
    assert (bins.low[holder] <= finite).all()
    assert (finite <= bins.high[holder]).all()
    if finite.size:
        assert (bins.low[0], bins.high[-1]) == (finite[0], finite[-1])


def test_bins_are_at_most_a_sixty_fourth_wide(statistics_of):
    values = np.random.default_rng(1).standard_normal(10_000) * 10.0 ** np.random.default_rng(2).integers(
        -30, 30, 10_000
    )

    bins = statistics_of(values).bins

    assert ((bins.high - bins.low) <= np.minimum(np.abs(bins.low), np.abs(bins.high)) / 64).all()


@pytest.fixture
def statistics(statistics_of):
    random = np.random.default_rng(0)
    tensors = {
        "x": statistics_of(random.standard_normal((8, 3)), "x", channel_axis=-1),
        "y/é": statistics_of([-1.5, np.inf], "y/é"),
        "empty": statistics_of([], "empty"),
    }
    return Statistics("model", ("a1", "b2"), tensors, ("a note",))


def assert_same_statistics(left, right):
    assert (left.model_digest, left.sample_digests, left.notes) == (
        right.model_digest,
        right.sample_digests,
        right.notes,
    )
    assert list(left.tensors) == list(right.tensors)
    for name in left.tensors:
        assert_equal(left.tensors[name], right.tensors[name])


def test_what_was_saved_is_loaded(statistics, tmp_path):
    statistics.save(tmp_path / "s.npz")

    assert_same_statistics(Statistics.load(tmp_path / "s.npz"), statistics)


def test_statistics_without_tensors_are_saved_and_loaded(tmp_path):
    statistics = Statistics("model", (), {})
    statistics.save(tmp_path / "s.npz")

    assert_same_statistics(Statistics.load(tmp_path / "s.npz"), statistics)


def test_saving_twice_gives_the_same_bytes(statistics, tmp_path):
    statistics.save(tmp_path / "a.npz")
    statistics.save(tmp_path / "b.npz")

    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_merged_statistics_hold_the_samples_of_both(statistics, statistics_of):
    other = replace(statistics, sample_digests=("a0",), notes=("another", "a note"))

    merged = statistics.merge(other)

    assert merged.sample_digests == ("a0", "a1", "b2")
    assert merged.notes == ("a note", "another")
    assert merged.samples == 3
    assert merged.tensors["x"].count == 48
    assert_same_statistics(merged, other.merge(statistics))
    assert merged.samples_digest == other.merge(statistics).samples_digest != statistics.samples_digest


def test_statistics_of_another_model_are_refused(statistics):
    other = replace(statistics, model_digest="0123456789abcdef")

    with pytest.raises(InputError) as caught:
        other.merge(statistics)

    assert str(caught.value) == (
        "These statistics were collected on another model (digest model…, not 0123456789ab…). "
        "Collect them anew: qdeploy calibrate SOURCE --calibration DATA -o STATS."
    )


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"There is no statistics file .*s\.npz\. Make one with qdeploy calibrate\."):
        Statistics.load(tmp_path / "s.npz")


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip file", b"\x93NUMPY\x01\x00"])
def test_a_file_of_another_kind_is_refused(content, tmp_path):
    path = tmp_path / "s.npz"
    path.write_bytes(content)

    with pytest.raises(InputError, match=r"s\.npz is not a statistics file of this version, or is damaged \("):
        Statistics.load(path)


def test_arrays_of_another_kind_are_refused(tmp_path):
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    np.save(tmp_path / "one.npy", np.zeros(3))

    for name in ("other.npz", "one.npy"):
        with pytest.raises(InputError, match="is not a statistics file"):
            Statistics.load(tmp_path / name)


@pytest.fixture(scope="module")
def saved(statistics_of, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "s.npz"
    statistics = Statistics("model", ("a1",), {"x": statistics_of(np.linspace(-1, 1, 50), "x")})
    statistics.save(path)
    return path, path.read_bytes(), statistics


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_does_no_harm(data, saved):
    path, content, statistics = saved
    place = data.draw(st.integers(0, len(content) - 1))
    damaged = path.with_name("damaged.npz")
    damaged.write_bytes(
        content[:place] + bytes([content[place] ^ data.draw(st.integers(1, 255))]) + content[place + 1 :]
    )

    try:
        loaded = Statistics.load(damaged)
    except InputError as error:
        assert "is not a statistics file of this version, or is damaged" in error.what  # noqa: PT017
    else:
        assert_same_statistics(loaded, statistics)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_cut_file_is_refused(share, saved):
    path, content, _ = saved
    cut = path.with_name("cut.npz")
    cut.write_bytes(content[: int(share * len(content))])

    with pytest.raises(InputError, match="or is damaged"):
        Statistics.load(cut)
