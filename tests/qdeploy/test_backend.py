from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest

from qdeploy.backend import Artifact, Backend, input_arrays, parse_options
from qdeploy.errors import InputError


@dataclass(frozen=True)
class Options:
    threads: int = 0
    timeout: float = 1.5
    level: Literal["basic", "all"] = "all"
    strict: bool = False
    device: str = "cpu"
    shapes: tuple[str, ...] = ()


class Toy(Backend):
    name = "toy"
    options_type = Options


def test_options_that_are_not_given_keep_their_defaults():
    assert parse_options(Toy, {}) == Options()
    assert parse_options(Toy, {"threads": "2"}) == Options(threads=2)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("threads", "4", 4),
        ("timeout", "0.25", 0.25),
        ("level", "basic", "basic"),
        ("strict", "true", True),
        ("strict", "false", False),
        ("device", "cuda:0", "cuda:0"),
        ("shapes", "1x3,8x3", ("1x3", "8x3")),
        ("shapes", "1x3", ("1x3",)),
        ("shapes", "1x3, 8x3", ("1x3", "8x3")),
        ("shapes", "", ()),
    ],
)
def test_texts_become_values_of_the_options_type(key, text, value):
    parsed = getattr(parse_options(Toy, {key: text}), key)

    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "takes"),
    [
        ("threads", "two", "int"),
        ("threads", "2.5", "int"),
        ("timeout", "soon", "float"),
        ("level", "most", "basic, all"),
        ("strict", "yes", "true or false"),
        ("strict", "True", "true or false"),
    ],
)
def test_a_text_that_does_not_fit_is_refused(key, text, takes):
    with pytest.raises(InputError) as caught:
        parse_options(Toy, {key: text})

    assert caught.value.what == f"The option toy.{key} cannot be {text!r}."
    assert caught.value.cure == f"It takes: {takes}."


def test_an_unknown_option_is_refused_with_the_nearest_name():
    with pytest.raises(InputError) as caught:
        parse_options(Toy, {"thread": "2"})

    assert caught.value.what == "toy has no option 'thread'."
    assert caught.value.cure == "Did you mean 'threads'? Known: threads, timeout, level, strict, device, shapes."


def test_inputs_are_made_contiguous_without_changing_them():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)

    made = input_arrays({"x": array})["x"]

    assert made.flags.c_contiguous
    np.testing.assert_array_equal(made, array)


def test_an_artifact_opens_at_its_main_file(tmp_path):
    assert Artifact("toy", "int8", tmp_path, "model.bin", ()).path == tmp_path / "model.bin"
