"""The preprocessing written into edge packages computes what the bundle's own does."""

from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qdeploy.bundle.packages.shipped import preprocessing_code
from qdeploy.samples.preprocessing import Preprocessing


def shipped(preprocessing):
    """The function that a package with this preprocessing holds."""
    names = {"__name__": "preprocess"}
    exec(compile(preprocessing_code(preprocessing), "preprocess.py", "exec"), names)
    return names["preprocess"]


def png(pixels):
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


numbers = st.floats(0.01, 100)


@st.composite
def preprocessings(draw):
    color = draw(st.sampled_from(["rgb", "bgr", "gray"]))
    count = 1 if color == "gray" else draw(st.sampled_from([1, 3]))
    resize = draw(st.integers(5, 20))
    crops = st.none() | st.integers(1, resize) | st.tuples(st.integers(1, resize), st.integers(1, resize))
    return Preprocessing(
        resize=resize,
        crop=draw(crops),
        scale=draw(numbers),
        mean=tuple(draw(st.lists(numbers, min_size=count, max_size=count))),
        std=tuple(draw(st.lists(numbers, min_size=count, max_size=count))),
        layout=draw(st.sampled_from(["nchw", "nhwc"])),
        color=color,
    )


@settings(max_examples=60, deadline=None)
@given(preprocessings(), st.integers(5, 30), st.integers(5, 30), st.booleans(), st.integers(0, 2**32 - 1))
def test_it_is_the_bundles(preprocessing, height, width, gray, seed):
    shape = (height, width) if gray else (height, width, 3)
    content = png(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))
    expected = preprocessing.apply(Image.open(BytesIO(content)))

    found = shipped(preprocessing)(content)

    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_its_numbers_stand_at_the_top_as_they_were_given():
    code = preprocessing_code(Preprocessing(crop=(6, 8), mean=(0.25,), std=(0.5,), color="bgr"))

    lines = code.splitlines()
    assert (
        "RESIZE: int | None = None  # pixels of the shorter side, bilinear, aspect kept; None leaves the size" in lines
    )
    assert "CROP: tuple[int, int] | None = (6, 8)  # height and width of the central rectangle; None keeps all" in lines
    assert 'COLOR: str = "bgr"  # order of the channels: rgb, bgr or gray' in lines
    assert "STD: tuple[float, ...] = (0.5,)" in lines


def test_an_image_that_does_not_fit_is_refused_in_a_sentence():
    preprocess = shipped(Preprocessing(crop=8))

    with pytest.raises(ValueError, match="The image's 7x9 pixels are fewer than the crop of 8x8"):
        preprocess(png(np.zeros((9, 7, 3), np.uint8)))
    with pytest.raises(ValueError, match="more than 8 bits a channel"):
        preprocess(png(np.zeros((9, 9), np.uint16)))
