"""Samples from a file of texts: .txt with one a line, or .csv with texts and, if there are any, labels.

The first row of a .csv is a header if one of its cells is "text", "label" or "score". Then the labels stand in the
column "label", or else "score"; the text stands in the column "text", or else in all others, which are one, or two for
pairs. Without a header, a last column of numbers holds the labels, and those before it the texts.

A pair that is taken apart becomes two samples, one after the other, with the same label.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from qdeploy.errors import InputError
from qdeploy.registry import suggestion
from qdeploy.samples.source import Sample, SampleSource, evenly_spaced, how_many
from qdeploy.samples.tokenization import EXAMPLE, Encode, Tokenization

SUFFIXES = (".csv", ".txt")
TEXT = "text"
LABELS = ("label", "score")


@dataclass(frozen=True)
class _Row:
    """One row of a file.

    Attributes:
        line: Where it ends, counted from 1.
        texts: One, or two for a pair.
        label: An integer only if it is written as one.
    """

    line: int
    texts: tuple[str, ...]
    label: float | None


@dataclass(frozen=True)
class _Columns:
    """Which columns of a .csv are what, by their positions; `count` is how many each row must have."""

    texts: tuple[int, ...]
    label: int | None
    count: int


def open_text(
    path: Path, input_names: tuple[str, ...], tokenization: Tokenization | None, limit: int | None
) -> SampleSource:
    """The texts of a file, one a sample, or two where pairs are taken apart; under a limit, evenly spaced rows.

    Labels are integers if all of them are written as such.

    Args:
        path: A .csv or .txt file in UTF-8.
        input_names: Of the model; the tokenizer must give an array for each.
        tokenization: How a text becomes inputs.
        limit: Most samples, or None for all.

    Raises:
        InputError: No tokenizer, the file or the tokenizer is wrong, or the tokenizer does not suit the model.
        UnavailableError: The package tokenizers is not installed.
    """
    if tokenization is None:
        what = f"The file {path} holds text, and nothing says how it becomes the model's inputs."
        raise InputError(what, f"Give --tokenizer, or preprocessing in the recipe, for example: {EXAMPLE}")
    encode = tokenization.encoder()
    first, count, label_type = _survey(path, tokenization)
    parts = 2 if tokenization.pairs == "apart" and len(first.texts) == 2 else 1
    if limit is not None and limit < parts:
        raise InputError(f"The number of samples is limited to {limit}, and a pair makes two.", "Give at least 2.")
    picked = evenly_spaced(count, None if limit is None else limit // parts)
    _inputs(encode, input_names, first.texts[:1] if parts == 2 else first.texts, "the first text")  # found early
    unit = "texts" if len(first.texts) == 1 else "pairs"
    return SampleSource(
        description=f"text in {path.name} ({how_many(len(picked), count, unit)})",
        stream=partial(_stream, path, tokenization, encode, input_names, picked, label_type),
        size=parts * len(picked),
        preprocessing=tokenization,
    )


def _survey(path: Path, tokenization: Tokenization) -> tuple[_Row, int, type[np.number[Any]]]:
    """The first row, the number of rows, and the type of their labels; every row is looked at."""
    rows = _rows(path, tokenization)
    first = next(rows, None)
    if first is None:
        raise InputError(f"The file {path} holds no text.", "Give at least one.")
    numbers = [text for text in first.texts if _number(text) is not None]
    if path.suffix == ".csv" and numbers and not tokenization.columns:
        what = f"Line {first.line} of {path} has the number {numbers[0]!r} where a text is looked for."
        raise InputError(what, "Give the file a header with a column text, or name the text columns (columns).")
    count, integers = 0, True
    for row in chain([first], rows):
        count += 1
        integers = integers and not isinstance(row.label, float)
    return first, count, np.int64 if integers else np.float64


def _stream(
    path: Path,
    tokenization: Tokenization,
    encode: Encode,
    input_names: tuple[str, ...],
    picked: Sequence[int],
    label_type: type[np.number[Any]],
) -> Iterator[Sample]:
    wanted = iter(picked)
    following = next(wanted, None)
    position = 0
    for index, row in enumerate(_rows(path, tokenization)):
        if index != following:
            continue
        following = next(wanted, None)
        labels = None if row.label is None else np.array([row.label], label_type)
        for texts in [(text,) for text in row.texts] if tokenization.pairs == "apart" else [row.texts]:
            origin = f"sample {position} (line {row.line} of {path.name})"
            raw = np.frombuffer(json.dumps(texts, ensure_ascii=False).encode(), np.uint8)
            yield Sample(_inputs(encode, input_names, texts, origin), labels, origin, {input_names[0]: raw})
            position += 1


def _inputs(encode: Encode, input_names: tuple[str, ...], texts: tuple[str, ...], origin: str) -> dict[str, Any]:
    """What the tokenizer gives for one text or for two together, as far as the model takes it."""
    arrays = encode(*texts)
    for name in input_names:
        if name not in arrays:
            what = f"The model has the input {name!r}, and the tokenizer gives {', '.join(arrays) or 'nothing'}."
            raise InputError(what, "Name the inputs alike, or give a tokenizer of your own: file.py:callable.")
        if arrays[name].size == 0:
            raise InputError(f"The tokenizer found no tokens in {origin}: {texts[0]!r}.", "Leave it out.")
    return {name: arrays[name] for name in input_names}


def _rows(path: Path, tokenization: Tokenization) -> Iterator[_Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _lines(file) if path.suffix == ".txt" else _table(path, file, tokenization.columns)
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.", "Check the path.") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"The file {path} cannot be read: {error}.", "Write it in UTF-8, quoted as csv.") from error


def _lines(file: TextIO) -> Iterator[_Row]:
    for line, text in enumerate(file, 1):
        if text.strip():
            yield _Row(line, (text.strip(),), None)


def _table(path: Path, file: TextIO, wanted: tuple[str, ...]) -> Iterator[_Row]:
    reader = csv.reader(file, strict=True)
    rows = ((reader.line_num, cells) for cells in reader if cells)
    first = next(rows, None)
    if first is None:
        return
    names = [cell.strip().lower() for cell in first[1]]
    header = bool(wanted) or not {TEXT, *LABELS}.isdisjoint(names)
    columns = _named_columns(path, names, wanted) if header else _unnamed_columns(path, first[1])
    for line, cells in rows if header else chain([first], rows):
        yield _row(path, columns, line, cells)


def _named_columns(path: Path, names: list[str], wanted: tuple[str, ...]) -> _Columns:
    label = next((names.index(name) for name in LABELS if name in names), None)
    for name in wanted:
        if name.lower() not in names:
            raise InputError(f"The file {path} has no column {name!r}.", suggestion(name, names))
    if wanted or TEXT in names:
        texts = tuple(names.index(name.lower()) for name in wanted or (TEXT,))
        return _Columns(texts, label, len(names))
    return _one_or_two(path, _Columns(tuple(i for i in range(len(names)) if i != label), label, len(names)))


def _unnamed_columns(path: Path, first: list[str]) -> _Columns:
    last = len(first) - 1
    if last > 0 and _number(first[last]) is not None:
        return _one_or_two(path, _Columns(tuple(range(last)), last, len(first)))
    return _one_or_two(path, _Columns(tuple(range(len(first))), None, len(first)))


def _one_or_two(path: Path, columns: _Columns) -> _Columns:
    if len(columns.texts) not in (1, 2):
        what = f"The file {path} has {len(columns.texts)} columns that could be text."
        raise InputError(what, "Give it a header with a column text, or name the text columns (columns).")
    return columns


def _row(path: Path, columns: _Columns, line: int, cells: list[str]) -> _Row:
    if len(cells) != columns.count:
        what = f"Line {line} of {path} has {len(cells)} columns; the first row has {columns.count}."
        raise InputError(what, "Quote texts that hold commas.")
    texts = tuple(cells[i].strip() for i in columns.texts)
    if not all(texts):
        raise InputError(f"A text in line {line} of {path} is empty.", "Leave the row out.")
    if columns.label is None:
        return _Row(line, texts, None)
    label = _number(cells[columns.label])
    if label is None:
        what = f"The label {cells[columns.label]!r} in line {line} of {path} is no number."
        raise InputError(what, "Number the classes from 0.")
    return _Row(line, texts, label)


def _number(cell: str) -> float | None:
    """The finite number that a cell holds, an integer if it is written as one; None if it holds none."""
    if re.fullmatch(r"\s*[+-]?\d{1,18}\s*", cell):
        return int(cell)
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
