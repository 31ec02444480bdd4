"""Samples from a folder of .npy or .npz files, each of which holds one sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.errors import InputError
from qdeploy.samples.arrays import DAMAGE, LABELS
from qdeploy.samples.folders import SampleFolder, open_folder
from qdeploy.samples.source import Sample, SampleSource, evenly_spaced, native

SUFFIXES = (".npy", ".npz")


def open_array_folder(
    folder: Path, input_names: tuple[str, ...], ranks: Mapping[str, int], limit: int | None
) -> SampleSource:
    """The array files of a folder and its sub-folders, sorted by path; under a limit, evenly spaced ones.

    A .npy file is the input of a model that has only one; a .npz file has its arrays named by the inputs, and may hold
    `labels`. An array is a whole model input; one with an axis less than the input is one item of a batch.

    Args:
        folder: Its class sub-folders, if any, are the labels of files that hold none.
        input_names: Of the model.
        ranks: How many axes each input has, where known.
        limit: Most samples, or None for all.

    Raises:
        InputError: No such file, or .npy files for a model with several inputs.
    """
    found = open_folder(folder, SUFFIXES)
    if not found.files:
        raise InputError(f"The folder {folder} holds no arrays.", f"Arrays end in {', '.join(SUFFIXES)}.")
    if len(input_names) != 1 and any(file.suffix.lower() == ".npy" for file in found.files):
        what = f"The folder {folder} holds .npy files, and the model has the inputs {', '.join(input_names)}."
        raise InputError(what, "Write .npz files with one array for each: numpy.savez(path, **inputs).")
    picked = [found.files[i] for i in evenly_spaced(len(found.files), limit)]
    places = list(enumerate(picked))
    read = partial(_stream, found, input_names, ranks)
    return SampleSource(
        description=f"arrays in {found.name} ({found.contents(len(picked))})",
        stream=partial(read, places),
        pick=lambda part: read([places[i] for i in part]),
        size=len(picked),
        class_names=found.classes,
    )


def _stream(
    folder: SampleFolder, input_names: tuple[str, ...], ranks: Mapping[str, int], places: Sequence[tuple[int, Path]]
) -> Iterator[Sample]:
    for position, file in places:
        arrays = _read(folder.path / file, input_names)
        labels = None if LABELS in input_names else arrays.pop(LABELS, None)
        inputs = {name: _whole(array, ranks.get(name)) for name, array in arrays.items()}
        if labels is None:
            first = next(iter(inputs.values()))
            labels = folder.label(file, len(first) if first.ndim else 1)
        yield Sample(inputs, None if labels is None else np.atleast_1d(labels), folder.origin(position, file))


def _read(path: Path, input_names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """The arrays of a file by input name."""
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {input_names[0]: native(content)}
        with content:
            arrays = {name: native(content[name]) for name in content.files}
    except DAMAGE as error:
        # numpy takes whatever it does not know for a pickle, and advises to load it.
        reason = "it holds Python objects or no array" if "pickle" in str(error) else error
        raise InputError(f"The file {path} cannot be read: {reason}.", "Write it with numpy.save or savez.") from error
    if arrays.keys().isdisjoint(input_names):
        raise InputError(f"The file {path} holds no inputs.", f"Name its arrays: {', '.join(input_names)}.")
    return arrays


def _whole(array: NDArray[Any], rank: int | None) -> NDArray[Any]:
    return array[np.newaxis] if rank is not None and array.ndim == rank - 1 else array
