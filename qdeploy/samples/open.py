"""One door to all sources: the form of DATA decides which."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qdeploy.errors import InputError
from qdeploy.samples.arrays import open_arrays
from qdeploy.samples.callables import load_callable
from qdeploy.samples.images import open_images
from qdeploy.samples.iterables import open_callable, open_python
from qdeploy.samples.preprocessing import Preprocessing
from qdeploy.samples.source import SampleSource

FORMS = "Give a folder of images, an .npz file, file.py:callable or package.module:callable."


def open_samples(
    data: Any,
    *,
    input_names: tuple[str, ...],
    ranks: Mapping[str, int] = MappingProxyType({}),
    preprocessing: Preprocessing | None = None,
    limit: int | None = None,
) -> SampleSource:
    """The samples that DATA stands for.

    Args:
        data: As on the command line (a folder of images, an .npz file, `file.py:callable`,
            `package.module:callable`), or from Python any re-iterable, a callable without arguments, an ORT
            CalibrationDataReader, or a source that is open already.
        input_names: Of the model, in order.
        ranks: How many axes each input has, where known: it decides how the arrays of an .npz file are cut.
        preprocessing: How images become the model's input; other forms are taken as they are.
        limit: Most samples to read: evenly spaced over files and arrays, the first ones of anything else.

    Raises:
        InputError: DATA is none of these, or is wrong in itself; what it yields is checked by `checked`.
        UnavailableError: Images are to be read and Pillow is not installed.
    """
    if limit is not None and limit < 1:
        raise InputError(f"The number of samples is limited to {limit}.", "Give at least 1.")
    if isinstance(data, SampleSource):
        return _first(data, limit)
    if not isinstance(data, str | os.PathLike):
        return open_python(data, input_names, limit)
    text = str(data)
    path = Path(text)
    if path.is_dir():
        return open_images(path, input_names, preprocessing, limit)
    if path.suffix == ".npz":
        return open_arrays(path, input_names, ranks, limit)
    if ":" in text:
        return open_callable(load_callable(text), input_names, limit)
    what = f"Samples cannot be read from the file {text}." if path.exists() else f"There is no file or folder {text}."
    raise InputError(what, FORMS)


def _first(source: SampleSource, limit: int | None) -> SampleSource:
    size = source.size if limit is None or source.size is None else min(source.size, limit)
    return replace(source, stream=lambda: islice(source, limit), size=size)
