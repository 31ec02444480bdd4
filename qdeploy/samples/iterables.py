"""Samples from Python: callables, lists, torch DataLoaders, ONNX Runtime's calibration data readers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.errors import InputError
from qdeploy.samples.callables import UserCallable, user_code
from qdeploy.samples.source import Sample, SampleSource, native

ITEM_CURE = "Yield a mapping from input names to arrays, batch included, or a pair (mapping, labels)."
_END = object()


def open_python(data: Any, input_names: tuple[str, ...], limit: int | None) -> SampleSource:
    """Samples from an object given in Python; under a limit, the first ones.

    Args:
        data: A re-iterable (a list, a DataLoader), an ORT CalibrationDataReader, or a callable without arguments that
            gives either anew for each pass.
        input_names: Of the model, in order.
        limit: Most samples to read, or None for all.

    Raises:
        InputError: A generator, which one pass would use up, or an object that is none of these.
    """
    kind = type(data).__name__
    if isinstance(data, type):  # it makes a new object for each pass
        return open_callable(UserCallable(data.__name__, data), input_names, limit)
    if hasattr(data, "get_next"):
        return open_callable(UserCallable(kind, _ReaderPasses(data, kind)), input_names, limit)
    if isinstance(data, Iterator):
        what = f"The samples are a {kind}, which can be read only once; several passes are needed."
        raise InputError(what, "Pass the function that makes it, or a list.")
    if hasattr(data, "__iter__"):
        return open_callable(UserCallable(kind, lambda: data), input_names, limit, _length(data))
    if callable(data):
        return open_callable(UserCallable(getattr(data, "__name__", kind), data), input_names, limit)
    raise InputError(
        f"Samples cannot be read from an object of type {kind}.", "Pass a list, a DataLoader or a callable."
    )


def open_callable(
    function: UserCallable, input_names: tuple[str, ...], limit: int | None, length: int | None = None
) -> SampleSource:
    """Samples from a callable without arguments that gives an iterable anew for each pass.

    Each item is a mapping name → array, a pair (inputs, labels), an array, or a tuple of arrays in the order of
    `input_names`, which may be followed by the labels. In a mapping, "labels" are the labels, unless it is an input.
    """
    size = length if limit is None or length is None else min(length, limit)
    return SampleSource(
        description=f"samples of {function.name}",
        stream=partial(_stream, function, input_names, limit),
        size=size,
    )


class _ReaderPasses:
    """Begins a pass over an ORT calibration data reader: the first as it stands, the others after rewind()."""

    def __init__(self, reader: Any, kind: str) -> None:
        self._reader = reader
        self._kind = kind
        self._begun = False

    def __call__(self) -> Any:
        if self._begun:
            if not hasattr(self._reader, "rewind"):
                what = f"The {self._kind} can be read only once, and a second pass is needed."
                raise InputError(what, "Give it a method rewind(), or pass a callable that makes a new one.")
            self._reader.rewind()
        self._begun = True
        return self._reader


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:  # a DataLoader over a stream has the method and refuses to answer
        return None


def _stream(function: UserCallable, input_names: tuple[str, ...], limit: int | None) -> Iterator[Sample]:
    given = function()
    with user_code(function.name, function.folder):
        items = iter(given.get_next, None) if hasattr(given, "get_next") else iter(given)
    for position in count() if limit is None else range(limit):
        with user_code(function.name, function.folder):
            item = next(items, _END)
        if item is _END:
            return
        yield _sample(item, input_names, f"sample {position} of {function.name}")


def _sample(item: Any, input_names: tuple[str, ...], origin: str) -> Sample:
    inputs, labels = _parts(item, input_names, origin)
    arrays = {name: _array(value, origin) for name, value in inputs.items()}
    return Sample(arrays, None if labels is None else np.atleast_1d(_array(labels, origin)), origin)


def _parts(item: Any, input_names: tuple[str, ...], origin: str) -> tuple[Mapping[str, Any], Any]:
    """Inputs by name, and labels or None."""
    if isinstance(item, Mapping) and "labels" not in input_names:
        return {name: value for name, value in item.items() if name != "labels"}, item.get("labels")
    if isinstance(item, tuple | list):
        if len(item) == 2 and isinstance(item[0], Mapping | tuple | list):
            return _named(item[0], input_names, origin), item[1]
        if len(item) == len(input_names) + 1:
            return _named(item[:-1], input_names, origin), item[-1]
    return _named(item, input_names, origin), None


def _named(given: Any, input_names: tuple[str, ...], origin: str) -> Mapping[str, Any]:
    """Inputs by name from a mapping, from a tuple in their order, or from the only one."""
    if isinstance(given, Mapping):
        return given
    values = given if isinstance(given, tuple | list) else (given,)
    if len(values) != len(input_names):
        what = f"The number of arrays in {origin} is {len(values)}; the model's inputs are {', '.join(input_names)}."
        raise InputError(what, ITEM_CURE)
    return dict(zip(input_names, values, strict=True))


def _array(value: Any, origin: str) -> NDArray[Any]:
    try:
        array = np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
    except (TypeError, ValueError) as error:
        raise InputError(f"A {type(value).__name__} in {origin} is no array: {error}.", ITEM_CURE) from error
    if array.dtype.kind not in "biufc":
        raise InputError(f"A {type(value).__name__} in {origin} is no array of numbers.", ITEM_CURE)
    return native(array)
