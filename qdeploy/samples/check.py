"""Samples checked against the model's inputs as they stream by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.errors import InputError
from qdeploy.model import TensorSpec
from qdeploy.registry import suggestion
from qdeploy.samples.source import Sample, SampleSource


def checked(
    source: SampleSource, inputs: tuple[TensorSpec, ...], optional: tuple[TensorSpec, ...] = ()
) -> SampleSource:
    """The same samples; one that the model cannot take raises an InputError when its turn comes.

    Refused are: a name that is no input, a missing input, another dtype or shape, NaN or Inf, labels of another length
    than the batch, and a pass without samples.

    Args:
        source: The samples.
        inputs: Of the model.
        optional: Further inputs of the model, which a sample may lack.
    """
    pick = source.pick
    return replace(
        source,
        stream=lambda: _stream(source, iter(source), inputs, optional),
        pick=pick and (lambda part: _stream(source, pick(part), inputs, optional)),
    )


def _stream(
    source: SampleSource, samples: Iterator[Sample], inputs: tuple[TensorSpec, ...], optional: tuple[TensorSpec, ...]
) -> Iterator[Sample]:
    empty = True
    for sample in samples:
        _check_names(sample, inputs, optional)
        for spec in (*inputs, *(spec for spec in optional if spec.name in sample.inputs)):
            _check_array(source, sample, spec)
        _check_labels(sample, inputs)
        empty = False
        yield _in_order(sample, (*inputs, *optional))
    if empty:
        raise InputError(f"No samples came: {source.description}.", "Give at least one.")


def _in_order(sample: Sample, specs: tuple[TensorSpec, ...]) -> Sample:
    """The sample with its inputs in the model's order: the first one's batch counts as the sample's."""
    names = [spec.name for spec in specs if spec.name in sample.inputs]
    if names == [*sample.inputs]:
        return sample
    return replace(sample, inputs={name: sample.inputs[name] for name in names})


def _check_names(sample: Sample, inputs: tuple[TensorSpec, ...], optional: tuple[TensorSpec, ...]) -> None:
    names = [spec.name for spec in (*inputs, *optional)]
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
            cure = f"A sample holds whole model inputs, batch included.{_open_dimensions(spec, array.shape)}"
        raise InputError(f"The input {spec.name!r} of {sample.origin} {mismatch}.", cure)
    if bad := _non_finite(array):
        raise InputError(f"The input {spec.name!r} of {sample.origin} holds {bad}.", "Mend the sample or leave it out.")


def _open_dimensions(spec: TensorSpec, shape: tuple[int, ...]) -> str:
    """How to export with names for the dimensions that differ, so that they may vary; empty for another rank."""
    if len(shape) != len(spec.shape):
        return ""
    dims = zip(spec.shape, shape, strict=True)
    named = tuple(f"n{i}" if isinstance(dim, int) and dim != size else dim for i, (dim, size) in enumerate(dims))
    return f" A dimension that varies is exported with a name: --input '{replace(spec, shape=named)}'."


def _non_finite(array: NDArray[Any]) -> str:
    """How many NaN and infinite values there are; empty if none."""
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return ""
    return f"{np.isnan(array).sum()} NaN and {np.isinf(array).sum()} infinite values"


def _check_labels(sample: Sample, inputs: tuple[TensorSpec, ...]) -> None:
    if sample.labels is not None and sample.labels.dtype.kind not in "biuf":
        what = f"The labels of {sample.origin} have dtype {sample.labels.dtype.name}."
        raise InputError(what, "Give classes as integers that count from 0, or real numbers.")
    if sample.labels is not None and (bad := _non_finite(sample.labels)):
        raise InputError(f"The labels of {sample.origin} hold {bad}.", "Mend them or leave the sample out.")
    batches = [sample.inputs[spec.name].shape[0] for spec in inputs if spec.shape]
    if sample.labels is None or not batches or len(sample.labels) == batches[0]:
        return
    what = f"The batch of {sample.origin} has {batches[0]} items and {len(sample.labels)} labels."
    raise InputError(what, "Give one label for each item.")
