"""Samples checked against the model's inputs as they stream by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.errors import InputError
from qdeploy.model import TensorSpec
from qdeploy.registry import suggestion
from qdeploy.samples.source import Sample, SampleSource


def checked(source: SampleSource, inputs: tuple[TensorSpec, ...]) -> SampleSource:
    """The same samples; one that the model cannot take raises an InputError when its turn comes.

    Refused are: a name that is no input, a missing input, another dtype or shape, NaN or Inf, labels of another length
    than the batch, and a pass without samples.
    """
    return replace(source, stream=partial(_stream, source, inputs))


def _stream(source: SampleSource, inputs: tuple[TensorSpec, ...]) -> Iterator[Sample]:
    empty = True
    for sample in source:
        _check_names(sample, inputs)
        for spec in inputs:
            _check_array(source, sample, spec)
        _check_labels(sample, inputs)
        empty = False
        yield sample
    if empty:
        raise InputError(f"No samples came: {source.description}.", "Give at least one.")


def _check_names(sample: Sample, inputs: tuple[TensorSpec, ...]) -> None:
    names = [spec.name for spec in inputs]
    for name in sample.inputs:
        if name not in names:
            raise InputError(
                f"The array {name!r} of {sample.origin} is no input of the model.", suggestion(name, names)
            )
    for spec in inputs:
        if spec.name not in sample.inputs:
            raise InputError(f"The input {spec.name!r} is missing in {sample.origin}.", f"The model takes {spec}.")


def _check_array(source: SampleSource, sample: Sample, spec: TensorSpec) -> None:
    array = sample.inputs[spec.name]
    dtype = array.dtype.name
    if mismatch := spec.mismatch(dtype, array.shape):
        if source.preprocessing is not None:
            cure = f"Change the preprocessing ({source.preprocessing.shaping}), or yield arrays from a callable."
        elif dtype != spec.dtype:
            cure = f"Convert it to {spec.dtype}."
        else:
            cure = "A sample holds whole model inputs, batch included."
        raise InputError(f"The input {spec.name!r} of {sample.origin} {mismatch}.", cure)
    if bad := _non_finite(array):
        raise InputError(f"The input {spec.name!r} of {sample.origin} holds {bad}.", "Mend the sample or leave it out.")


def _non_finite(array: NDArray[Any]) -> str:
    """How many NaN and infinite values there are; empty if none."""
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return ""
    return f"{np.isnan(array).sum()} NaN and {np.isinf(array).sum()} infinite values"


def _check_labels(sample: Sample, inputs: tuple[TensorSpec, ...]) -> None:
    batches = [sample.inputs[spec.name].shape[0] for spec in inputs if spec.shape]
    if sample.labels is None or not batches or len(sample.labels) == batches[0]:
        return
    what = f"The batch of {sample.origin} has {batches[0]} items and {len(sample.labels)} labels."
    raise InputError(what, "Give one label for each item.")
