"""TOML as text: tomllib reads back what was written."""

import math
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.toml import toml_text

texts = st.text(st.characters(exclude_categories=["Cs"]))
scalars = texts | st.booleans() | st.integers() | st.floats(allow_nan=False)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
tables = st.dictionaries(texts, values, max_size=4)
documents = st.dictionaries(texts, tables | st.lists(tables, min_size=1, max_size=3), max_size=4)


@given(documents)
def test_tomllib_reads_back_what_was_written(document):
    assert tomllib.loads(toml_text(document)) == document


def test_what_is_written_is_laid_out_for_people():
    document = {
        "model": {"source": "model.py:build", "dims": {"batch": [1, 1, 8]}},
        "parity": {"max drop": 0.01},
        "target": [{"name": "ort-cpu", "fast": True}, {"name": "größe"}],
    }

    assert toml_text(document) == (
        "[model]\n"
        'source = "model.py:build"\n'
        "dims = {batch = [1, 1, 8]}\n"
        "\n"
        "[parity]\n"
        '"max drop" = 0.01\n'
        "\n"
        "[[target]]\n"
        'name = "ort-cpu"\n'
        "fast = true\n"
        "\n"
        "[[target]]\n"
        'name = "größe"\n'
    )


@pytest.mark.parametrize("number", [1e16, 5e-324, math.inf, -math.inf, -0.0, 2**70])
def test_numbers_come_back_exactly(number):
    read = tomllib.loads(toml_text({"a": {"b": number}}))["a"]["b"]

    assert (read, type(read), math.copysign(1, read)) == (number, type(number), math.copysign(1, number))


def test_a_number_that_is_none_comes_back():
    assert math.isnan(tomllib.loads(toml_text({"a": {"b": math.nan}}))["a"]["b"])
