""".npz files: cut into samples as numpy would cut them, streamed, and refused when they do not fit."""

import tracemalloc
import zipfile
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.errors import InputError
from qdeploy.samples.arrays import open_arrays

X = np.arange(24, dtype=np.float32).reshape(4, 2, 3)


@pytest.fixture(params=[np.savez, np.savez_compressed], ids=["stored", "compressed"])
def save(request, tmp_path):
    """Writes x.npz and gives its path."""

    def write(**arrays):
        request.param(tmp_path / "x.npz", **arrays)
        return tmp_path / "x.npz"

    return write


def opened(path, names=("x",), limit=None, **ranks):
    return open_arrays(path, names, ranks, limit)


@pytest.mark.parametrize("ranks", [{"x": 3}, {}], ids=["same rank", "unknown rank"])
def test_items_are_cut_with_a_batch_of_one(save, ranks):
    source = opened(save(x=X, labels=np.arange(4)), **ranks)
    samples = list(source)

    assert source.description == "arrays in x.npz (4 samples)"
    assert source.size == len(samples) == 4
    for i, sample in enumerate(samples):
        np.testing.assert_array_equal(sample.inputs["x"], X[i : i + 1], strict=True)
        np.testing.assert_array_equal(sample.labels, [i])
        assert sample.origin == f"sample {i} of x.npz"


def test_whole_inputs_keep_their_batch_and_have_a_label_for_each_item(save):
    labels = np.arange(8).reshape(4, 2)

    for i, sample in enumerate(opened(save(x=X, labels=labels), x=2)):
        np.testing.assert_array_equal(sample.inputs["x"], X[i], strict=True)
        np.testing.assert_array_equal(sample.labels, labels[i])


def test_labels_of_items_may_be_vectors(save):
    labels = np.arange(8.0).reshape(4, 2)

    for i, sample in enumerate(opened(save(x=X, labels=labels), x=3)):
        np.testing.assert_array_equal(sample.labels, labels[i : i + 1], strict=True)


def test_one_label_for_each_whole_input(save):
    samples = opened(save(x=X, labels=np.arange(4)), x=2)

    assert [s.labels.tolist() for s in samples] == [[0], [1], [2], [3]]


def test_scalar_inputs(save):
    samples = list(opened(save(x=np.array([1.5, 2.5])), x=0))

    assert [s.inputs["x"].shape for s in samples] == [(), ()]
    assert [float(s.inputs["x"]) for s in samples] == [1.5, 2.5]


def test_labels_may_be_an_input(save):
    (sample,) = opened(save(x=X[:1], labels=X[:1]), ("x", "labels"))

    assert set(sample.inputs) == {"x", "labels"}
    assert sample.labels is None


def test_a_second_pass_gives_the_same(save):
    source = opened(save(x=X))

    assert [s.inputs["x"].tolist() for s in source] == [s.inputs["x"].tolist() for s in source]


@given(
    count=st.integers(1, 20),
    limit=st.none() | st.integers(1, 25),
    dtype=st.sampled_from(["float32", ">f4", "float16", "int64", ">i8", "uint8", "bool"]),
    inner=st.lists(st.integers(0, 3), max_size=3),
    seed=st.integers(0, 99),
)
def test_every_array_is_read_as_numpy_reads_it(tmp_path_factory, count, limit, dtype, inner, seed):
    x = np.random.default_rng(seed).integers(0, 2, (count, *inner)).astype(dtype)
    path = tmp_path_factory.mktemp("arrays") / "x.npz"
    np.savez_compressed(path, x=x)

    positions = [int(s.origin.split()[1]) for s in opened(path, limit=limit)]

    assert positions == sorted(set(positions))
    assert len(positions) == min(count, limit or count)
    assert positions[0] == 0
    assert max(np.diff([*positions, count])) - min(np.diff([*positions, count])) <= 1
    for i, sample in zip(positions, opened(path, limit=limit), strict=True):
        np.testing.assert_array_equal(sample.inputs["x"], x[i : i + 1])
        assert sample.inputs["x"].dtype == x.dtype.newbyteorder("=")


def test_a_limit_is_described(save):
    assert opened(save(x=X), limit=2).description == "arrays in x.npz (2 of 4 samples)"


def test_rows_are_streamed(save):
    path = save(x=np.zeros((500, 10_000), np.float32))  # 20 MB
    tracemalloc.start()
    for _ in opened(path):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 2_000_000


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X, "imgae": X}, "The array 'imgae' in {path} is no input of the model. Known: x, mask, labels."),
        ({"x": X, "masks": X}, "Did you mean 'mask'?"),
        ({"x": X}, "{path} lacks the input 'mask'. It has: x."),
        ({"x": X, "mask": X[:3]}, "differ in their number of samples: 'x' has 4, 'mask' has 3."),
        (
            {"x": X, "mask": X, "labels": X[:1]},
            "differ in their number of samples: 'x' has 4, 'mask' has 4, 'labels' has 1",
        ),
        ({"x": X[:0], "mask": X[:0]}, "The arrays in {path} hold no samples."),
        ({"x": X, "mask": np.float32(1)}, "The array 'mask' in {path} is a single number."),
        ({"x": X, "mask": np.array([None, 1, 2, 3])}, "The array 'mask' in {path} holds Python objects."),
        ({"x": X, "mask": np.asfortranarray(X)}, "The array 'mask' in {path} is stored column by column"),
        (
            {"x": X, "mask": X[..., None, None]},
            "has shape [4, 2, 3, 1, 1]; the input has 3 dimensions. Give 3 dimensions, or 4",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(save, arrays, message):
    path = save(**arrays)

    with pytest.raises(InputError) as caught:
        opened(path, ("x", "mask"), x=3, mask=3)

    assert message.format(path=path) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"There is no file .*no\.npz"):
        opened(tmp_path / "no.npz")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04"])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)

    with pytest.raises(InputError, match=r"x\.npz is not an .npz file, or is damaged: .* Write it with numpy\.savez\."):
        opened(tmp_path / "x.npz")


def test_an_array_cut_short_is_refused_when_reached(save):
    whole = save(x=X)
    with zipfile.ZipFile(whole) as archive:
        content = archive.read("x.npy")
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("x.npy", content[:-4])
    stream = iter(opened(whole))

    assert [next(stream).inputs["x"].shape for _ in range(3)] == [(1, 2, 3)] * 3
    with pytest.raises(InputError, match="the array 'x' ends within sample 3"):
        next(stream)


def test_a_damaged_header_is_refused(save):
    whole = save(x=X)
    with zipfile.ZipFile(whole) as archive:
        content = archive.read("x.npy")
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("x.npy", content.replace(b"}", b"("))

    with pytest.raises(InputError, match=r"x\.npz is not an \.npz file, or is damaged"):
        opened(whole)


@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, position, value):
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    np.savez_compressed(path, x=X)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)

    with suppress(InputError):
        list(opened(path))
