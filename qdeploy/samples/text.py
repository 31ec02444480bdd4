"""Samples from a file of texts: .txt with a text a line, or .csv with texts and, if there are any, labels.

The first row of a .csv is a header if one of its cells is "text", "label" or "score". Then the column "label" (or else
"score") holds the labels, and the text is the column "text", or else all others: one, or two for pairs. Without a
header, a last column of numbers holds the labels, and those before it are the texts.

A pair that is taken apart becomes two consecutive samples with the same label.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.errors import InputError
from qdeploy.registry import suggestion
from qdeploy.samples.source import Sample, SampleSource, evenly_spaced, how_many
from qdeploy.samples.tokenization import EXAMPLE, Encode, Tokenization

SUFFIXES = (".csv", ".txt")
LABEL_COLUMNS = ("label", "score")
TEXT_COLUMN = "text"


@dataclass(frozen=True)
class _Row:
    """A row of a file: its texts, and its label if there are any; `line` is where it ends, counted from 1."""

    line: int
    texts: tuple[str, ...]
    label: str | None


@dataclass(frozen=True)
class _Layout:
    """Which columns of a .csv are what.

    Attributes:
        header: Whether the first row names the columns.
        texts: Positions of the text columns.
        label: Position of the labels, or None.
        width: How many columns every row must have.
    """

    header: bool
    texts: tuple[int, ...]
    label: int | None
    width: int


def open_text(
    path: Path, input_names: tuple[str, ...], tokenization: Tokenization, limit: int | None = None
) -> SampleSource:
    """The texts of a file, one a sample, or two when pairs are taken apart; under a limit, evenly spaced rows.

    Labels are integers if all of them are written so, otherwise real numbers.

    Args:
        path: A .csv or .txt file in UTF-8.
        input_names: Of the model: those that the tokenizer gives.
        tokenization: How a text becomes inputs.
        limit: Most samples, or None for all.

    Raises:
        InputError: The file or the tokenizer is wrong, or does not give the model's inputs.
        UnavailableError: The package tokenizers is not installed.
    """
    rows = partial(_rows, path, tokenization)
    encode = tokenization.encoder()
    first, count, label_type = _survey(path, rows())
    apart = tokenization.pairs == "apart" and len(first.texts) == 2
    samples_of = partial(_samples, encode, input_names, apart)
    next(samples_of(first, None, "the first text"))  # a tokenizer that does not suit the model is found here
    if apart and limit == 1:
        raise InputError("The number of samples is limited to 1, and a pair makes two.", "Give at least 2.")
    picked = evenly_spaced(count, limit // 2 if apart and limit else limit)
    unit = "texts" if len(first.texts) == 1 else "pairs"
    return SampleSource(
        description=f"text in {path.name} ({how_many(len(picked), count, unit)})",
        stream=partial(_stream, rows, samples_of, picked, count, label_type, path.name),
        size=len(picked) * (2 if apart else 1),
        preprocessing=tokenization,
    )
