"""Samples from an .npz file, read row by row."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from qdeploy.errors import InputError
from qdeploy.registry import suggestion
from qdeploy.samples.source import Sample, SampleSource, evenly_spaced, how_many, native

LABELS = "labels"
DAMAGE = (
    *(OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError),
    *(TokenError, zipfile.BadZipFile, zlib.error),
)
"""What zipfile and numpy raise on damaged files."""


@dataclass(frozen=True)
class _Array:
    """The header of one array in the file.

    Attributes:
        name: Without ".npy".
        dtype: As stored, byte order included.
        shape: The first axis counts the samples.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def open_arrays(
    path: Path,
    input_names: tuple[str, ...],
    ranks: Mapping[str, int],
    limit: int | None,
    states: tuple[str, ...] = (),
) -> SampleSource:
    """The rows of arrays that are named by the model's inputs; under a limit, evenly spaced ones.

    An array `a` with one axis more than its input holds whole inputs, a[i]; otherwise it holds items of a batch and
    sample i is a[i:i+1]. The optional array `labels` has one entry a sample.

    Args:
        path: The .npz file; compressed or not, without pickles.
        input_names: Of the model.
        ranks: How many axes each input has; an input whose rank is not known is cut as a[i:i+1].
        limit: Most samples to read, or None for all.
        states: Further inputs, which the file may lack.

    Raises:
        InputError: The file is missing or damaged, or its arrays do not fit the inputs.
    """
    with _damage_reported(path):
        arrays = _headers(path)
    input_names = (*input_names, *(name for name in states if name in arrays))
    _require_names(path, arrays, input_names)
    count = _common_length(path, arrays)
    row_shapes = {name: _row_shape(path, arrays[name], ranks.get(name)) for name in input_names}
    if LABELS in arrays and LABELS not in input_names:
        whole = any(len(row_shapes[name]) < len(arrays[name].shape) for name in input_names)
        shape = arrays[LABELS].shape
        row_shapes[LABELS] = shape[1:] if whole and len(shape) > 1 else (1, *shape[1:])
    picked = evenly_spaced(count, limit)
    read = partial(_stream, path, row_shapes, input_names)
    return SampleSource(
        description=f"arrays in {path.name} ({how_many(len(picked), count, 'samples')})",
        stream=partial(read, picked),
        pick=lambda part: read([picked[i] for i in part]),
        size=len(picked),
    )


@contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.", "Check the path.") from error
    except DAMAGE as error:
        raise InputError(
            f"{path} is not an .npz file, or is damaged: {error}.", "Write it with numpy.savez."
        ) from error


def _headers(path: Path) -> dict[str, _Array]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            with archive.open(member) as stream:
                arrays[name] = _header(path, name, stream)
    return arrays


def _header(path: Path, name: str, stream: IO[bytes]) -> _Array:
    """Read an array's header, which leaves the stream at its first row."""
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(npy.read_magic(stream))
    if read is None:
        raise InputError(f"The array {name!r} in {path} is structured.", "Store plain numbers.")
    shape, fortran_order, dtype = read(stream)
    if dtype.hasobject:
        raise InputError(
            f"The array {name!r} in {path} holds Python objects.", "Store plain numbers: pickles are refused."
        )
    if fortran_order and len(shape) > 1:
        what = f"The array {name!r} in {path} is stored column by column (Fortran order) and cannot be read by samples."
        raise InputError(what, "Store numpy.ascontiguousarray of it.")
    if not shape:
        raise InputError(f"The array {name!r} in {path} is a single number.", "Its first axis must count the samples.")
    return _Array(name, dtype, shape)


def _require_names(path: Path, arrays: Mapping[str, _Array], input_names: tuple[str, ...]) -> None:
    for name in arrays:
        if name not in (*input_names, LABELS):
            what = f"The array {name!r} in {path} is no input of the model."
            raise InputError(what, suggestion(name, [*input_names, LABELS]))
    for name in input_names:
        if name not in arrays:
            raise InputError(f"{path} lacks the input {name!r}.", f"It has: {', '.join(arrays) or 'no arrays'}.")


def _common_length(path: Path, arrays: Mapping[str, _Array]) -> int:
    lengths = {name: array.shape[0] for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name!r} has {length}" for name, length in lengths.items())
        raise InputError(f"The arrays in {path} differ in their number of samples: {listed}.", "Make them equal.")
    count = next(iter(lengths.values()))
    if count < 1:
        raise InputError(f"The arrays in {path} hold no samples.", "Store at least one.")
    return count


def _row_shape(path: Path, array: _Array, rank: int | None) -> tuple[int, ...]:
    """Shape of one sample of an input."""
    axes = len(array.shape)
    if rank is None or axes == rank:
        return (1, *array.shape[1:])
    if axes == rank + 1:
        return array.shape[1:]
    what = f"The array {array.name!r} in {path} has shape {list(array.shape)}; the input has {rank} dimensions."
    raise InputError(what, f"Give {rank} dimensions, or {rank + 1} when each sample is a whole input.")


def _stream(
    path: Path, row_shapes: Mapping[str, tuple[int, ...]], input_names: tuple[str, ...], picked: Sequence[int]
) -> Iterator[Sample]:
    with _damage_reported(path), zipfile.ZipFile(path) as archive:
        rows = zip(*(_rows(path, archive, name, shape, picked) for name, shape in row_shapes.items()), strict=True)
        for position, row in zip(picked, rows, strict=True):
            arrays = dict(zip(row_shapes, row, strict=True))
            labels = None if LABELS in input_names else arrays.get(LABELS)
            yield Sample({name: arrays[name] for name in input_names}, labels, f"sample {position} of {path.name}")


def _rows(
    path: Path, archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], picked: Sequence[int]
) -> Iterator[NDArray[Any]]:
    with archive.open(f"{name}.npy") as stream:
        dtype = _header(path, name, stream).dtype
        size = int(np.prod(shape)) * dtype.itemsize
        start = stream.tell()
        for position in picked:
            stream.seek(start + position * size)
            content = bytearray(stream.read(size))
            if len(content) < size:
                message = f"the array {name!r} ends within sample {position}"
                raise EOFError(message)
            yield native(np.ndarray(shape, dtype, content))
