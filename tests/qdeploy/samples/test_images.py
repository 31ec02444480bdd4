"""Folders of images: order, labels, limits and files that are no images."""

import builtins

import numpy as np
import pytest
from PIL import Image  # tests may load at once what they need

from qdeploy.errors import InputError, UnavailableError
from qdeploy.samples.images import open_images
from qdeploy.samples.preprocessing import Preprocessing

RAW = Preprocessing(scale=1.0)


@pytest.fixture
def folder(tmp_path):
    """An empty folder with a name of its own."""
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def draw(folder, *files):
    """Images of one colour each: the n-th has the value n everywhere."""
    for value, file in enumerate(files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (value, value, value)).save(folder / file)


def opened(folder, limit=None, preprocessing=RAW):
    return open_images(folder, ("image",), preprocessing, limit)


def values(source):
    return [int(sample.inputs["image"].max()) for sample in source]


def test_images_come_sorted_by_path_without_labels(folder):
    draw(folder, "b.png", "a.bmp", "deep/er/c.PNG")
    (folder / "notes.txt").write_text("no image")
    (folder / "._a.png").write_text("what macOS leaves behind")

    source = opened(folder)
    samples = list(source)

    assert [int(s.inputs["image"].max()) for s in samples] == [1, 0, 2]
    assert samples[0].inputs["image"].shape == (1, 3, 3, 4)
    assert all(s.labels is None for s in samples)
    assert samples[2].origin == "sample 2 (photos/deep/er/c.PNG)"
    assert source.description == "images in photos/ (3 files)"
    assert (source.size, source.preprocessing, source.class_names) == (3, RAW, ())


def test_a_second_pass_gives_the_same(folder):
    draw(folder, "a.png", "b.png")
    source = opened(folder)

    assert values(source) == values(source) == [0, 1]


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".bmp", ".webp"])
def test_every_suffix_is_read(folder, suffix):
    draw(folder, f"a{suffix}")

    assert len(list(opened(folder))) == 1


def test_sub_folders_are_the_classes_in_sorted_order(folder):
    draw(folder, "dog/1.png", "cat/2.png", "cat/inner/3.png")
    (folder / "bird").mkdir()  # a class without images still counts

    source = opened(folder)

    assert [int(s.labels[0]) for s in source] == [1, 1, 2]
    assert all(s.labels.shape == (1,) for s in source)
    assert source.class_names == ("bird", "cat", "dog")
    assert source.description == "images in photos/ (3 files in 3 classes)"


@pytest.mark.parametrize(
    ("folders", "labels"),
    [
        (["289_n02128757", "7", "010_x"], [10, 289, 7]),
        (["289_n02128757", "7", "cat"], [0, 1, 2]),
        (["2023-01-05", "2023-02-03"], [0, 1]),
        (["3dprinter", "4wheeler"], [0, 1]),
    ],
)
def test_integers_that_begin_every_folder_name_are_the_labels(folder, folders, labels):
    draw(folder, *(f"{name}/1.png" for name in folders))

    assert [int(s.labels[0]) for s in opened(folder)] == labels


def test_two_folders_for_one_integer_are_refused(folder):
    draw(folder, "7/1.png", "07_x/1.png")

    with pytest.raises(
        InputError, match=r"The class folders '07_x' and '7' both stand for label 7\. Rename one of them\."
    ):
        opened(folder)


def test_an_image_beside_the_sub_folders_means_no_labels(folder):
    draw(folder, "cat/1.png", "dog/1.png", "top.png")

    assert [s.labels for s in opened(folder)] == [None, None, None]


def test_classes_behind_links_are_found(folder, tmp_path):
    draw(tmp_path / "elsewhere", "1.png")
    (folder / "cat").symlink_to(tmp_path / "elsewhere", target_is_directory=True)

    assert opened(folder).class_names == ("cat",)
    assert values(opened(folder)) == [0]


def test_a_limit_takes_evenly_spaced_files(folder):
    draw(folder, *(f"{name}/{i}.png" for name in "abc" for i in range(4)))

    source = opened(folder, limit=3)

    assert [int(s.labels[0]) for s in source] == [0, 1, 2]
    assert source.size == 3
    assert source.description == "images in photos/ (3 of 12 files in 3 classes)"
    assert opened(folder, limit=99).size == 12


def test_a_folder_without_images_is_refused(folder):
    with pytest.raises(InputError, match=r"photos holds no images. Images end in .jpg, .jpeg, .png, .bmp, .webp."):
        opened(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda _: b"text", r"The file .*photos/b\.png is no image of a known format\. Mend or remove it\."),
        (lambda content: content[:45], r"The image .*photos/b\.png cannot be decoded: .* Mend or remove it\."),
    ],
)
def test_a_file_that_cannot_be_decoded_is_named(folder, damage, message):
    draw(folder, "a.png", "b.png")
    (folder / "b.png").write_bytes(damage((folder / "b.png").read_bytes()))

    with pytest.raises(InputError, match=message):
        list(opened(folder))


def test_an_image_that_is_too_small_is_named(folder):
    draw(folder, "a.png")

    with pytest.raises(InputError, match=r"The image .*a\.png does not fit. Its 4×3 pixels are fewer than the crop"):
        list(opened(folder, preprocessing=Preprocessing(crop=8)))


def test_preprocessing_is_asked_for(folder):
    draw(folder, "a.png")

    with pytest.raises(InputError, match=r"nothing says how they become the model's input\. Give --preprocess"):
        opened(folder, preprocessing=None)


def test_a_model_with_two_inputs_takes_no_folder(folder):
    draw(folder, "a.png")

    with pytest.raises(InputError, match=r"the model has the inputs image, mask\. Yield all of them from a callable"):
        open_images(folder, ("image", "mask"), RAW, None)


def test_a_missing_pillow_is_reported_with_its_cure(folder, monkeypatch):
    real_import = builtins.__import__

    def without_pillow(name, *arguments):
        if name == "PIL":
            raise ModuleNotFoundError(name="PIL")
        return real_import(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_pillow)

    with pytest.raises(UnavailableError, match=r"Pillow is not installed. Install it: pip install 'qdeploy\[images\]'"):
        opened(folder)


def test_the_description_of_a_relative_folder_names_it(folder, monkeypatch):
    draw(folder, "a.png")
    monkeypatch.chdir(folder)

    assert opened(type(folder)()).description == "images in photos/ (1 files)"


def test_images_are_what_pillow_reads(folder):
    noise = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")

    (sample,) = opened(folder)

    np.testing.assert_array_equal(sample.inputs["image"][0], noise.transpose(2, 0, 1))
