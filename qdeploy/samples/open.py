"""One door to all sources: the form of DATA decides which."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from qdeploy.errors import InputError
from qdeploy.samples import array_folders, audio, images, text
from qdeploy.samples.arrays import open_arrays
from qdeploy.samples.callables import load_callable
from qdeploy.samples.folders import files_below
from qdeploy.samples.iterables import open_callable, open_python
from qdeploy.samples.kinds import AnyPreprocessing
from qdeploy.samples.preprocessing import Preprocessing
from qdeploy.samples.source import SampleSource
from qdeploy.samples.tokenization import Tokenization

Kind = TypeVar("Kind")

FORMS = (
    "Give a folder of images, .wav or .npy files, a .csv, .txt or .npz file, "
    "file.py:callable or package.module:callable."
)


@dataclass(frozen=True)
class Opening:
    """DATA with all that it takes to open it, here or in another process; the attributes are `open_samples`' arguments.

    Of a sequence whose samples carry states the first ones are taken under a limit, with none between.
    """

    data: Any
    input_names: tuple[str, ...]
    ranks: Mapping[str, int]
    preprocessing: AnyPreprocessing | None = None
    limit: int | None = None
    states: tuple[str, ...] = ()

    def open(self) -> SampleSource:
        """The samples.

        Raises:
            InputError: As `open_samples`.
            UnavailableError: As `open_samples`.
        """
        opened = open_samples(
            self.data,
            input_names=self.input_names,
            ranks=self.ranks,
            preprocessing=self.preprocessing,
            limit=None if self.states else self.limit,
            states=self.states,
        )
        return _first(opened, self.limit) if self.states else opened


def open_samples(
    data: Any,
    *,
    input_names: tuple[str, ...],
    ranks: Mapping[str, int] = MappingProxyType({}),
    preprocessing: AnyPreprocessing | None = None,
    limit: int | None = None,
    states: tuple[str, ...] = (),
) -> SampleSource:
    """The samples that DATA stands for.

    Args:
        data: As on the command line (a folder of images, of .wav files or of .npy and .npz files, a .csv, .txt or .npz
            file, `file.py:callable`, `package.module:callable`), or from Python any re-iterable, a callable without
            arguments, an ORT CalibrationDataReader, or a source that is open already.
        input_names: Of the model, in order.
        ranks: How many axes each input has, where known: it decides how the arrays of an .npz file are cut.
        preprocessing: How images, texts or audio become the model's input; other forms are taken as they are.
        limit: Most samples to read: evenly spaced over files, arrays and texts, the first ones of anything else.
        states: Further inputs, which a sample may give or not.

    Raises:
        InputError: DATA is none of these, or is wrong in itself; what it yields is checked by `checked`.
        UnavailableError: Images or texts are to be read and the package for it is not installed.
    """
    if limit is not None and limit < 1:
        raise InputError(f"The number of samples is limited to {limit}.", "Give at least 1.")
    if isinstance(data, SampleSource):
        return _first(data, limit)
    if not isinstance(data, str | os.PathLike):
        return open_python(data, input_names, limit)
    path = Path(data)
    if path.is_dir():
        return _open_folder(path, input_names, ranks, preprocessing, limit)
    if path.suffix == ".npz":
        return open_arrays(path, input_names, ranks, limit, states)
    if path.suffix in text.SUFFIXES:
        return text.open_text(path, input_names, _of_kind(Tokenization, preprocessing), limit)
    if ":" in str(data):
        return open_callable(load_callable(str(data)), input_names, limit)
    what = f"Samples cannot be read from the file {data}." if path.exists() else f"There is no file or folder {data}."
    raise InputError(what, FORMS)


def _open_folder(
    folder: Path,
    input_names: tuple[str, ...],
    ranks: Mapping[str, int],
    preprocessing: AnyPreprocessing | None,
    limit: int | None,
) -> SampleSource:
    """The samples of a folder; what its files are decides how it is read."""
    suffixes = {file.suffix.lower() for file in files_below(folder)}
    kinds = [kind for kind in (images, audio, array_folders) if not suffixes.isdisjoint(kind.SUFFIXES)]
    if len(kinds) != 1:
        holds = "files of more than one kind" if kinds else "no samples"
        known = ", ".join((*images.SUFFIXES, *audio.SUFFIXES, *array_folders.SUFFIXES))
        raise InputError(f"The folder {folder} holds {holds}.", f"Give one with files of one kind: {known}.")
    if kinds == [images]:
        return images.open_images(folder, input_names, _of_kind(Preprocessing, preprocessing), limit)
    if kinds == [audio]:
        return audio.open_audio(folder, input_names, ranks, _of_kind(audio.Windows, preprocessing), limit)
    return array_folders.open_array_folder(folder, input_names, ranks, limit)


def _of_kind(kind: type[Kind], preprocessing: AnyPreprocessing | None) -> Kind | None:
    """The preprocessing if it is for data of this kind; None sends the user to the one that is."""
    return preprocessing if isinstance(preprocessing, kind) else None


def _first(source: SampleSource, limit: int | None) -> SampleSource:
    size = source.size if limit is None or source.size is None else min(source.size, limit)
    return replace(source, stream=lambda: islice(source, limit), size=size, pick=None)
