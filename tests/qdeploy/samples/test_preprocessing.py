"""How an image becomes a model input, against a formula written out with numpy and Pillow."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image  # tests may load at once what they need

from qdeploy.errors import InputError
from qdeploy.samples.preprocessing import Preprocessing

IMAGENET = "resize=24 crop=20 mean=0.485,0.456,0.406 std=0.229,0.224,0.225"


def picture(width, height, mode="RGB"):
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8), mode)


def test_resize_crop_and_normalize_follow_the_formula():
    image = picture(50, 37)

    x = Preprocessing.parse(IMAGENET).apply(image)

    resized = np.asarray(image.resize((32, 24), Image.Resampling.BILINEAR), np.float64)  # ⌊24 · 50 / 37⌋ = 32
    square = resized[2:22, 6:26]
    expected = (square / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert x.dtype == np.float32
    assert x.shape == (1, 3, 20, 20)
    np.testing.assert_allclose(x[0], expected.transpose(2, 0, 1), atol=1e-6)


def test_an_upright_image_is_resized_by_its_width():
    assert Preprocessing(resize=10).apply(picture(20, 31)).shape == (1, 3, 15, 10)


def test_unscaled_pixels_with_one_mean_for_all_channels():
    image = picture(9, 7)

    x = Preprocessing.parse("scale=1 mean=127 std=128").apply(image)

    np.testing.assert_array_equal(x[0], (np.asarray(image, np.float32).transpose(2, 0, 1) - 127) / 128)


def test_channels_last_in_reverse_order():
    image = picture(9, 7)

    x = Preprocessing.parse("scale=1 color=bgr layout=nhwc mean=1,2,3 std=1,2,4").apply(image)

    np.testing.assert_array_equal(x[0], (np.asarray(image, np.float32)[..., [2, 1, 0]] - [1, 2, 3]) / [1, 2, 4])
    assert x.flags.c_contiguous


@pytest.mark.parametrize(("layout", "shape"), [("nchw", (1, 1, 7, 9)), ("nhwc", (1, 7, 9, 1))])
def test_gray_has_one_channel(layout, shape):
    x = Preprocessing(color="gray", layout=layout, scale=1.0).apply(image := picture(9, 7))

    assert x.shape == shape
    np.testing.assert_array_equal(x.reshape(7, 9), np.asarray(image.convert("L")))


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_other_modes_are_converted(mode):
    image = picture(9, 7, mode)

    x = Preprocessing(scale=1.0).apply(image)

    np.testing.assert_array_equal(x[0].transpose(1, 2, 0), np.asarray(image.convert("RGB")))


def test_the_crop_is_central_height_before_width():
    x = Preprocessing(crop=(2, 4), scale=1.0).apply(image := picture(10, 8))

    np.testing.assert_array_equal(x[0].transpose(1, 2, 0), np.asarray(image)[3:5, 3:7])


def test_parse_reads_every_setting():
    parsed = Preprocessing.parse("resize=256 crop=224,192 scale=1/255 mean=0.5 std=1/2,0.25,1e0 layout=nhwc color=bgr")

    assert parsed == Preprocessing(256, (224, 192), 1 / 255, (0.5,), (0.5, 0.25, 1.0), "nhwc", "bgr")
    assert Preprocessing.parse("") == Preprocessing()


def test_a_table_of_a_recipe_may_hold_numbers():
    table = {"crop": 224, "mean": 127, "std": [128.0], "scale": "1/255"}

    assert Preprocessing.from_json(table) == Preprocessing(crop=224, mean=(127.0,), std=(128.0,))


numbers = st.floats(0.01, 300)


@given(
    resize=st.none() | st.integers(1, 999),
    crop=st.none() | st.integers(1, 999) | st.tuples(st.integers(1, 999), st.integers(1, 999)),
    scale=numbers,
    mean=st.tuples(numbers) | st.tuples(numbers, numbers, numbers),
    layout=st.sampled_from(["nchw", "nhwc"]),
)
def test_json_gives_back_an_equal_object(resize, crop, scale, mean, layout):
    preprocessing = Preprocessing(resize, crop, scale, mean, layout=layout)

    assert Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json()))) == preprocessing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resise=256", "Preprocessing has no setting 'resise'. Did you mean 'resize'?"),
        ("resize", "The preprocessing 'resize' is not of the form key=value."),
        ("resize=wide", "The preprocessing's resize cannot be 'wide'."),
        ("resize=25.6", "The preprocessing's resize cannot be '25.6'."),
        ("resize=0", "The preprocessing's resize is 0 pixels."),
        ("crop=224,-1", "The preprocessing's crop is -1 pixels."),
        ("crop=1,2,3", "The preprocessing's crop cannot be '1,2,3'."),
        ("scale=1/0", "The preprocessing's scale cannot be '1/0'."),
        ("scale=nan", "The preprocessing's scale cannot be 'nan'."),
        ("mean=1,2", "The preprocessing's mean has 2 numbers; rgb has 3 channels."),
        ("color=gray std=1,2,3", "The preprocessing's std has 3 numbers; gray has 1 channels."),
        ("std=1,0,1", "The preprocessing cannot be computed"),
        ("layout=nhcw", "The preprocessing's layout cannot be 'nhcw'. Did you mean 'nhwc'?"),
        ("color=rbg", "The preprocessing's color cannot be 'rbg'."),
    ],
)
def test_wrong_settings_are_refused(text, message):
    with pytest.raises(InputError) as caught:
        Preprocessing.parse(text)

    assert message in str(caught.value)


def test_an_image_smaller_than_the_crop_is_refused():
    with pytest.raises(InputError, match=r"Its 9×7 pixels are fewer than the crop of 8×8\. Set resize"):
        Preprocessing(crop=8).apply(picture(9, 7))


def test_sixteen_bit_pixels_are_refused_rather_than_clipped():
    with pytest.raises(InputError, match="more than 8 bits"):
        Preprocessing().apply(Image.fromarray(np.zeros((4, 4), np.uint16)))
