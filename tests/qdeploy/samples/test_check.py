"""Samples checked against a model's inputs, one after the other."""

import numpy as np
import pytest

from qdeploy.errors import InputError
from qdeploy.model import TensorSpec
from qdeploy.samples.check import checked
from qdeploy.samples.preprocessing import Preprocessing
from qdeploy.samples.source import Sample, SampleSource

IMAGE = TensorSpec("image", "float32", ("batch", 3, 4))
LENGTH = TensorSpec("length", "int64", ())
X = np.zeros((2, 3, 4), np.float32)
NAN, INF = np.nan, np.inf


def source(*samples, preprocessing=None):
    named = [Sample(s.inputs, s.labels, f"sample {i} of list") for i, s in enumerate(samples)]
    return SampleSource("samples of list", lambda: iter(named), len(named), preprocessing)


def spoiled(*values):
    x = X.copy()
    x.flat[: len(values)] = values
    return x


def test_good_samples_pass_unchanged_any_number_of_times():
    labels = np.array([1, 2])
    given = source(Sample({"image": X, "length": np.array(5)}, labels), Sample({"image": X, "length": np.array(6)}))
    through = checked(given, (IMAGE, LENGTH))

    assert list(through) == list(through) == list(given)
    assert (through.description, through.size) == (given.description, given.size)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"imgae": X}, "The array 'imgae' of sample 1 of list is no input of the model. Did you mean 'image'?"),
        ({}, "The input 'image' is missing in sample 1 of list. The model takes image=float32[batch,3,4]."),
        ({"image": X.astype(float)}, "has dtype float64, the model takes float32. Convert it to float32."),
        (
            {"image": X[0]},
            "has shape [3, 4], the model takes 3 dimensions: image=float32[batch,3,4]. A sample holds whole",
        ),
        (
            {"image": X[:, :2]},
            "The input 'image' of sample 1 of list has shape [2, 2, 4], the model takes 3 at dimension 1",
        ),
        (
            {"image": spoiled(NAN, NAN, -INF)},
            "The input 'image' of sample 1 of list holds 2 NaN and 1 infinite values.",
        ),
    ],
)
def test_a_wrong_sample_is_refused_when_its_turn_comes(inputs, message):
    stream = iter(checked(source(Sample({"image": X}), Sample(inputs)), (IMAGE,)))
    next(stream)

    with pytest.raises(InputError) as caught:
        next(stream)

    assert message in str(caught.value)


def test_half_precision_is_searched_for_nan_too():
    half = TensorSpec("image", "float16", (1,))

    with pytest.raises(InputError, match="holds 0 NaN and 1 infinite values"):
        list(checked(source(Sample({"image": np.array([INF], np.float16)})), (half,)))


def test_images_of_another_shape_point_to_the_preprocessing():
    images = source(Sample({"image": X[:, :2]}), preprocessing=Preprocessing())

    with pytest.raises(InputError, match=r"Change the preprocessing \(resize, crop, color, layout\), or yield"):
        list(checked(images, (IMAGE,)))


def test_texts_of_another_length_are_told_of_open_dimensions():
    tokens = TensorSpec("input_ids", "int64", ("batch", 16))

    with pytest.raises(
        InputError, match=r"takes 16 at dimension 1.* exported with a name: --input 'input_ids=int64\[batch,n1\]'"
    ):
        list(checked(source(Sample({"input_ids": np.ones((1, 11), np.int64)})), (tokens,)))
    with pytest.raises(InputError, match=r"takes 2 dimensions.* batch included\.$"):
        list(checked(source(Sample({"input_ids": np.ones(11, np.int64)})), (tokens,)))


def test_labels_of_another_length_than_the_batch():
    with pytest.raises(InputError) as caught:
        list(checked(source(Sample({"image": X}, np.array([1, 2, 3]))), (IMAGE,)))

    message = "The batch of sample 0 of list has 2 items and 3 labels. Give one label for each item."
    assert str(caught.value) == message


def test_a_pass_without_samples_is_refused():
    with pytest.raises(InputError, match=r"No samples came: samples of list\. Give at least one\."):
        list(checked(source(), (IMAGE,)))
