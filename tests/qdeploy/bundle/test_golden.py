import time
import zipfile
from itertools import count

import numpy as np
import pytest

from qdeploy.bundle.golden import GoldenSample, read_golden, write_golden
from qdeploy.bundle.load import open_bundle
from qdeploy.bundle.manifest import seal
from qdeploy.model import TensorSpec


def sample(i, shape=(1, 3), **raw):
    image = np.full(shape, i, np.float32)
    outputs = {
        "float": {"logits": image * 2, "/head/out": image * 3},
        "ort-cpu": {"logits": image * 4, "/head/out": image * 5},
    }
    return GoldenSample({"image": image}, outputs, raw)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        pairs = [(one.inputs, other.inputs), (one.raw, other.raw)]
        pairs += [(one.outputs[folder], other.outputs[folder]) for folder in other.outputs]
        assert list(one.outputs) == list(other.outputs)
        for left, right in pairs:
            assert list(left) == list(right)
            for name in left:
                np.testing.assert_array_equal(left[name], right[name], strict=True)


def reopened(folder, manifest, shape):
    seal(folder, manifest.model_copy(update={"inputs": (TensorSpec("image", "float32", shape),)}))
    return read_golden(open_bundle(folder))


def test_arrays_are_named_by_inputs_and_by_folder_and_output(tmp_path):
    kept = write_golden(tmp_path, [sample(1), sample(2)])

    assert kept == 2
    with np.load(tmp_path / "golden/inputs.npz", allow_pickle=False) as file:
        assert file.files == ["image"]
        np.testing.assert_array_equal(file["image"], np.array([[1, 1, 1], [2, 2, 2]], np.float32), strict=True)
    with np.load(tmp_path / "golden/outputs.npz", allow_pickle=False) as file:
        assert file.files == ["float/logits", "float//head/out", "ort-cpu/logits", "ort-cpu//head/out"]
        np.testing.assert_array_equal(file["ort-cpu//head/out"][1:2], np.full((1, 3), 10, np.float32), strict=True)
    assert not (tmp_path / "golden/raw.npz").exists()


@pytest.mark.parametrize("shape", [(1, 3), (4, 3), (), (7,)])
def test_samples_of_any_shape_come_back(tmp_path, manifest, shape):
    samples = [sample(i, shape) for i in range(3)]
    write_golden(tmp_path, samples)

    assert_same(reopened(tmp_path, manifest, shape), samples)


def test_raw_samples_of_different_length_come_back(tmp_path, manifest):
    samples = [sample(i, image=np.arange(10 * i, dtype=np.uint8)) for i in range(3)]
    write_golden(tmp_path, samples)

    assert_same(reopened(tmp_path, manifest, ("batch", 3)), samples)


def test_a_bundle_without_golden_samples_has_none(tmp_path, manifest):
    assert write_golden(tmp_path, []) == 0
    assert reopened(tmp_path, manifest, ("batch", 3)) == ()


def test_samples_of_another_shape_are_left_out(tmp_path):
    assert write_golden(tmp_path, [sample(1), sample(2, (1, 4)), sample(3)]) == 2

    with np.load(tmp_path / "golden/inputs.npz") as file:
        assert file["image"][:, 0].tolist() == [1, 3]


def test_no_more_than_64_are_taken(tmp_path):
    numbers = count()

    assert write_golden(tmp_path, (sample(i) for i in numbers)) == 64
    assert next(numbers) == 64


def test_the_files_stay_within_16_megabytes(tmp_path):
    shape = (1, 100_000)  # 0.4 MB an array, five arrays a sample: 2 MB

    assert write_golden(tmp_path, (sample(i, shape) for i in range(64))) == 8
    size = sum(path.stat().st_size for path in (tmp_path / "golden").iterdir())
    assert 15.9e6 < size < 16.1e6


def test_a_sample_that_is_too_large_leaves_nothing(tmp_path):
    assert write_golden(tmp_path, [sample(1, (1, 1_000_000))]) == 0
    assert not (tmp_path / "golden").exists()


def test_equal_samples_give_equal_bytes_at_any_time(tmp_path, monkeypatch):
    written = []
    for folder, now in ((tmp_path / "a", 1e9), (tmp_path / "b", 1.5e9)):
        folder.mkdir()
        monkeypatch.setattr(time, "time", lambda now=now: now)
        write_golden(folder, [sample(1, image=np.arange(5, dtype=np.uint8))])
        written.append([path.read_bytes() for path in sorted((folder / "golden").iterdir())])

    assert written[0] == written[1]
    with zipfile.ZipFile(tmp_path / "a/golden/inputs.npz") as archive:
        assert [entry.date_time for entry in archive.infolist()] == [(1980, 1, 1, 0, 0, 0)]


def test_any_name_may_name_an_array(tmp_path):
    array = np.zeros((1, 2), np.float32)
    write_golden(tmp_path, [GoldenSample({"file": array, "allow_pickle": array}, {"float": {"out:0": array}})])

    with np.load(tmp_path / "golden/inputs.npz") as file:
        assert file.files == ["file", "allow_pickle"]


def test_nothing_is_pickled(tmp_path):
    objects = np.array([[{}]], dtype=object)

    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        write_golden(tmp_path, [GoldenSample({"image": objects}, {})])
