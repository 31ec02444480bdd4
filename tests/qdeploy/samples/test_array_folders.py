"""Folders of .npy and .npz files, one sample each."""

import numpy as np
import pytest

from qdeploy.errors import InputError
from qdeploy.samples.array_folders import open_array_folder

X = np.random.default_rng(0).normal(size=(6, 1, 2, 3)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def write(folder, *files):
    """The n-th file holds X[n]."""
    for array, file in zip(X, files, strict=False):
        (folder / file).parent.mkdir(exist_ok=True)
        np.save(folder / file, array)


def opened(folder, names=("x",), rank=3, limit=None):
    return open_array_folder(folder, names, {} if rank is None else dict.fromkeys(names, rank), limit)


def test_each_file_is_a_whole_model_input(folder):
    write(folder, "a.npy", "b.npy")

    source = opened(folder)

    for _ in range(2):
        np.testing.assert_array_equal([s.inputs["x"] for s in source], X[:2])
    assert [s.labels for s in source] == [None, None]
    assert [s.origin for s in source] == ["sample 0 (data/a.npy)", "sample 1 (data/b.npy)"]
    assert (source.description, source.size) == ("arrays in data/ (2 files)", 2)


@pytest.mark.parametrize(("rank", "shape"), [(3, (1, 2, 3)), (4, (1, 1, 2, 3)), (None, (1, 2, 3))])
def test_an_item_without_its_batch_gets_one(folder, rank, shape):
    write(folder, "a.npy")

    (sample,) = opened(folder, rank=rank)

    assert sample.inputs["x"].shape == shape


def test_sub_folders_are_the_labels_of_every_item(folder):
    write(folder, "dog/1.npy", "cat/1.npy")
    np.save(folder / "dog" / "2.npy", X[:3, 0])

    source = opened(folder)

    assert [s.labels.tolist() for s in source] == [[0], [1], [1, 1, 1]]
    assert source.class_names == ("cat", "dog")


def test_npz_files_hold_several_inputs_and_their_own_labels(folder):
    for i, label in enumerate((0.5, 2.0)):
        np.savez(folder / f"{i}.npz", x=X[i], mask=X[i + 1], labels=label)

    source = opened(folder, names=("mask", "x"))

    assert [s.labels.tolist() for s in source] == [[0.5], [2.0]]
    np.testing.assert_array_equal([s.inputs["x"] for s in source], X[:2])
    np.testing.assert_array_equal([s.inputs["mask"] for s in source], X[1:3])


def test_labels_may_be_an_input(folder):
    np.savez(folder / "0.npz", labels=X[0])

    (sample,) = opened(folder, names=("labels",))

    assert sample.labels is None
    assert list(sample.inputs) == ["labels"]


def test_a_limit_takes_evenly_spaced_files(folder):
    write(folder, *(f"{i}.npy" for i in range(6)))

    source = opened(folder, limit=2)

    np.testing.assert_array_equal([s.inputs["x"] for s in source], X[[0, 3]])
    assert (source.description, source.size) == ("arrays in data/ (2 of 6 files)", 2)


def test_npy_files_suit_models_with_one_input_only(folder):
    write(folder, "a.npy")

    with pytest.raises(
        InputError, match=r"holds \.npy files, and the model has the inputs x, mask\. Write \.npz files"
    ):
        opened(folder, names=("x", "mask"))


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
@pytest.mark.parametrize("content", [b"text", b""])
def test_a_damaged_file_is_named(folder, name, content):
    (folder / name).write_bytes(content)

    with pytest.raises(InputError, match=rf"data/{name} cannot be read: .* Write it with numpy\.save or savez\."):
        list(opened(folder))


def test_a_file_cut_short_is_named(folder):
    write(folder, "a.npy")
    (folder / "a.npy").write_bytes((folder / "a.npy").read_bytes()[:-1])

    with pytest.raises(InputError, match=r"data/a\.npy cannot be read:"):
        list(opened(folder))


def test_pickles_are_refused(folder):
    np.save(folder / "a.npy", np.array([{}], object), allow_pickle=True)

    with pytest.raises(InputError, match=r"a\.npy cannot be read: it holds Python objects or no array"):
        list(opened(folder))


def test_a_file_without_inputs_is_refused(folder):
    np.savez(folder / "a.npz", labels=[1])

    with pytest.raises(InputError, match=r"a\.npz holds no inputs\. Name its arrays: x\."):
        list(opened(folder))


def test_a_folder_without_arrays_is_refused(folder):
    with pytest.raises(InputError, match=r"data holds no arrays\. Arrays end in \.npy, \.npz\."):
        opened(folder)
