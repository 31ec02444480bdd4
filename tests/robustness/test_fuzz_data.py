"""Samples and bundles that are damaged or something else: one clear refusal, nothing written or unpickled."""

import io
import os
import random
import shutil
import struct
import wave
import zipfile

import numpy as np
import pytest

from qdeploy.bundle.load import open_bundle
from qdeploy.errors import InputError

FLIPS = int(os.environ.get("QDEPLOY_FUZZ", "24"))
"""How many files with changed or missing bytes are tried of each kind; more in a longer run."""

QUANTIZE = "quantize net.onnx --target ort-cpu --quiet --calibration"
PREPROCESSING = '[samples]\npreprocessing = "color=gray resize=8 crop=8"\n'
IMAGES = np.random.default_rng(0).normal(size=(4, 1, 8, 8)).astype(np.float32)


@pytest.fixture
def here(here, net):
    """The working folder, with the model."""
    (here / "net.onnx").write_bytes(net.SerializeToString())
    return here


def check_refused(ended, here):
    assert (ended.code, ended.out) == (2, ""), ended.err
    assert ended.err.startswith("error: ")
    assert "Traceback" not in ended.err
    assert not (here / "out").exists()
    assert not (here / "trap").exists()


def damaged(content, dice):
    """A file cut short, or with some of its bytes changed."""
    if dice.random() < 0.25:
        return content[: dice.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(dice.choice([1, 1, 2, 8])):
        changed[dice.randrange(len(changed))] = dice.choice([0, 255, dice.randrange(256)])
    return bytes(changed)


def saved(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def headed(header):
    """An array file with a header of one's own."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(100)


def shaped(shape):
    return headed(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode())


class Trap:
    """Unpickled, it leaves a file."""

    def __reduce__(self):
        return open, ("trap", "w")


MEMBERS = {
    "objects": saved(np.array([Trap()] * 4, object)),
    "texts": saved(np.array(["a"] * 4)),
    "a huge shape": shaped((2**40, 1, 8, 8)),
    "a shape beyond memory": shaped((1, 2**40, 2**40, 8)),
    "a negative shape": shaped((-4, 1, 8, 8)),
    "a shape of real numbers": shaped((4.0, 1, 8, 8)),
    "code in the header": headed(b"__import__('os').system('touch trap')\n"),
    "brackets in the header": headed(b"(" * 3000 + b")" * 3000),
    "an unknown version": b"\x93NUMPY\x09\x00" + bytes(100),
    "half of an array": saved(IMAGES)[:300],
    "text": b"hello",
    "nothing": b"",
}


@pytest.mark.parametrize("name", MEMBERS)
def test_an_archive_of_something_else_is_refused(here, qdeploy, name):
    with zipfile.ZipFile(here / "bad.npz", "w") as archive:
        archive.writestr("image.npy", MEMBERS[name])

    check_refused(qdeploy(f"{QUANTIZE} bad.npz"), here)


@pytest.mark.parametrize("name", MEMBERS)
def test_an_array_file_of_something_else_is_refused(here, qdeploy, name):
    (here / "arrays").mkdir()
    (here / "arrays" / "a.npy").write_bytes(MEMBERS[name])

    ended = qdeploy(f"{QUANTIZE} arrays")

    check_refused(ended, here)
    assert "allow_pickle=" not in ended.err


def test_a_member_without_its_suffix_is_refused(here, qdeploy):
    with zipfile.ZipFile(here / "bad.npz", "w") as archive:
        archive.writestr("image", saved(IMAGES))

    check_refused(qdeploy(f"{QUANTIZE} bad.npz"), here)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": IMAGES * np.nan}, "The input 'image' of sample 0 of bad.npz holds 64 NaN and 0 infinite values."),
        ({"image": IMAGES[:0]}, "The arrays in bad.npz hold no samples."),
        ({"image": IMAGES.astype(complex)}, "sample 0 of bad.npz has dtype complex128, the model takes float32."),
        ({"image": IMAGES, "labels": np.zeros(3, int)}, "'image' has 4, 'labels' has 3."),
        ({"image": IMAGES, "labels": np.array(list("abcd"))}, "The labels of sample 0 of bad.npz have dtype str32."),
        ({"image": IMAGES, "labels": np.zeros(4, complex)}, "The labels of sample 0 of bad.npz have dtype complex128."),
        (
            {"image": IMAGES, "labels": np.full(4, np.nan)},
            "The labels of sample 0 of bad.npz hold 1 NaN and 0 infinite",
        ),
        ({"image": IMAGES, "labels": np.full(4, 99)}, "The label 99 is none of the 3 classes"),
        ({"image": IMAGES, "labels": np.full(4, -1)}, "The label -1 is none of the 3 classes"),
        ({}, "bad.npz lacks the input 'image'."),
    ],
)
def test_arrays_that_do_not_fit_are_named(here, qdeploy, arrays, message):
    np.savez(here / "bad.npz", **arrays)

    ended = qdeploy(f"{QUANTIZE} bad.npz")

    check_refused(ended, here)
    assert message in ended.err


@pytest.mark.parametrize("seed", range(FLIPS // 2))
def test_damaged_arrays_are_used_or_refused(here, qdeploy, seed):
    (here / "bad.npz").write_bytes(damaged((here / "samples.npz").read_bytes(), random.Random(seed)))

    ended = qdeploy(f"{QUANTIZE} bad.npz")

    assert ended.code in (0, 1) or check_refused(ended, here) is None


def image(kind, mode="RGB", size=(16, 16)):
    from PIL import Image

    file = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(file, kind)
    return file.getvalue()


def deep_image():
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(file, "PNG")
    return file.getvalue()


READABLE = {
    "a.png": lambda: image("PNG"),
    "a gray one.png": lambda: image("PNG", "L"),
    "one pixel.png": lambda: image("PNG", size=(1, 1)),
    "cmyk.jpg": lambda: image("JPEG", "CMYK"),
    "gif.png": lambda: image("GIF", "P"),
    "one bit.png": lambda: image("PNG", "1"),
}


@pytest.mark.parametrize("name", READABLE)
def test_unusual_images_are_read(here, qdeploy, name):
    (here / "images").mkdir()
    (here / "images" / name).write_bytes(READABLE[name]())

    (here / "recipe.toml").write_text(PREPROCESSING)

    assert qdeploy(f"{QUANTIZE} images --recipe recipe.toml").code in (0, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: b"hello", "The file images/a.png is no image of a known format."),
        (lambda: b"", "The file images/a.png is no image of a known format."),
        (lambda: image("JPEG", size=(64, 64))[:700], "The image images/a.png cannot be decoded: "),
        (deep_image, "The image images/a.png does not fit. Its pixels have more than 8 bits (mode I"),
    ],
)
def test_files_that_are_no_images_are_named(here, qdeploy, content, message):
    (here / "images").mkdir()
    (here / "images" / "a.png").write_bytes(content())
    (here / "recipe.toml").write_text(PREPROCESSING)

    ended = qdeploy(f"{QUANTIZE} images --recipe recipe.toml")

    check_refused(ended, here)
    assert ended.err.startswith(f"error: {message}")


@pytest.mark.parametrize("seed", range(FLIPS // 2))
@pytest.mark.parametrize("content", [b"text,label\ngood,1\nbad,0\n", b'"a, b",1\n"c",0\n'])
def test_damaged_tables_are_read_or_refused(tmp_path, content, seed):
    from qdeploy.samples.text import _survey
    from qdeploy.samples.tokenization import Tokenization

    (tmp_path / "bad.csv").write_bytes(damaged(content, random.Random(seed)))
    try:
        _, count, _ = _survey(tmp_path / "bad.csv", Tokenization("tokenizer.json"))
    except InputError as refused:
        assert str(tmp_path) in refused.what  # noqa: PT017 - either may come
    else:
        assert 1 <= count <= 3


def tone():
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(np.arange(200, dtype="<i2").tobytes())
    return file.getvalue()


@pytest.mark.parametrize("seed", range(FLIPS))
def test_damaged_sounds_are_read_or_refused(tmp_path, seed):
    from qdeploy.samples.audio import Windows
    from qdeploy.samples.open import open_samples

    (tmp_path / "bad.wav").write_bytes(damaged(tone(), random.Random(seed)))
    windows = Windows(rate=8000, length=100)
    try:
        shapes = {s.inputs["x"].shape for s in open_samples(tmp_path, input_names=("x",), preprocessing=windows)}
    except InputError as refused:
        assert "bad.wav" in refused.what  # noqa: PT017 - either may come
    else:
        assert all(shape[-1] == 100 for shape in shapes)


@pytest.fixture(scope="session")
def whole(problem, tmp_path_factory):
    """A bundle. Not to be changed: copy it first."""
    from qdeploy import pipeline
    from qdeploy.model import ModelSource
    from qdeploy.recipe import Recipe, TargetRequest

    source, samples = ModelSource.parse(str(problem / "net.onnx")), str(problem / "samples.npz")
    output = tmp_path_factory.mktemp("whole") / "bundle"
    pipeline.run(Recipe(source=source, targets=(TargetRequest("ort-cpu"),), calibration=samples), output)
    return output


@pytest.mark.parametrize("seed", range(FLIPS))
def test_a_changed_byte_of_any_file_of_a_bundle_is_found(whole, tmp_path, seed):
    dice = random.Random(seed)
    bundle = shutil.copytree(whole, tmp_path / "bundle")
    file = dice.choice(sorted(path for path in bundle.rglob("*") if path.is_file()))
    content = bytearray(file.read_bytes())
    content[dice.randrange(len(content))] ^= dice.randrange(1, 256)
    file.write_bytes(content)

    with pytest.raises(InputError, match=f"{file.name} was changed"):
        open_bundle(bundle)
