"""Slices, and reading and writing at indices.

An index below zero or beyond its dimension is refused: what it gives is undefined from iOS 17 on, whatever
`validate_indices` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qdeploy.backends.coreml.interpreter.operators.arguments import Bools, Ints, Number
from qdeploy.backends.coreml.interpreter.operators.choice import choose
from qdeploy.errors import InputError


def slice_by_index(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    """Gives x[begin:end:stride, …] as numpy's; a mask leaves a bound out, or takes the one element at begin."""
    none = (False,) * x.ndim
    squeezed = squeeze_mask or none
    for axis in reversed(range(x.ndim)):
        size = x.shape[axis]
        if squeezed[axis]:
            start = 0 if (begin_mask or none)[axis] else begin[axis]
            x = x.select(axis, start)
            continue
        bounds = slice(
            None if (begin_mask or none)[axis] else begin[axis],
            None if (end_mask or none)[axis] else end[axis],
            stride[axis] if stride else 1,
        )
        places = range(*bounds.indices(size))
        if places != range(size):
            x = x.index_select(axis, torch.tensor(places, dtype=torch.int64))
    return x


def slice_by_size(x: Tensor, begin: Ints, size: Ints) -> Tensor:
    """The elements from begin on, so many in each dimension; −1 for all that are left."""
    for axis, (start, count) in enumerate(zip(begin, size, strict=True)):
        first = start % x.shape[axis] if start < 0 else start
        x = x.narrow(axis, first, x.shape[axis] - first if count == -1 else count)
    return x


def _checked(indices: Tensor, size: int, operator: str) -> Tensor:
    """The indices as torch wants them.

    Raises:
        InputError: One lies outside the dimension.
    """
    outside = indices[(indices < 0) | (indices >= size)]
    if outside.numel():
        what = f"{operator} is given the index {int(outside[0])} where there are {size} elements."
        raise InputError(what, "Check the inputs that hold indices, such as token ids.")
    return indices.long()


def gather(x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0) -> Tensor:
    """The slices of x at indices along an axis; the first `batch_dims` dimensions of both go together."""
    axis %= x.ndim
    places = _checked(indices, x.shape[axis], "gather")
    return _batched(lambda part, at: _take(part, at, axis - batch_dims), x, places, batch_dims)


def _take(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    taken = x.index_select(axis, indices.flatten())
    return taken.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0) -> Tensor:
    """The slices of x at places that the last dimension of indices holds."""
    for dimension in range(indices.shape[-1]):
        _checked(indices[..., dimension], x.shape[batch_dims + dimension], "gather_nd")
    return _batched(lambda part, at: part[at.long().unbind(-1)], x, indices, batch_dims)


def _batched(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, indices: Tensor, batch_dims: int) -> Tensor:
    """A function of x and indices for each element of their first dimensions."""
    if batch_dims == 0:
        return function(x, indices)
    batch = x.shape[:batch_dims]
    pairs = zip(x.flatten(0, batch_dims - 1), indices.flatten(0, batch_dims - 1), strict=True)
    return torch.stack([function(part, at) for part, at in pairs]).unflatten(0, batch)


def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    """The elements of x at indices along an axis, all other coordinates being the same."""
    return x.gather(axis, _checked(indices, x.shape[axis], "gather_along_axis"))


def scatter_along_axis(data: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, mode: str = "add") -> Tensor:
    """Data with updates written at indices along an axis, all other coordinates being the same."""
    return _write(data, _checked(indices, data.shape[axis], "scatter_along_axis"), updates, axis, mode)


def scatter(data: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, mode: str = "add") -> Tensor:
    """Data with slices written at indices along an axis."""
    places = _checked(indices, data.shape[axis], "scatter")
    along = places.reshape([-1 if d == axis % data.ndim else 1 for d in range(data.ndim)]).expand(updates.shape)
    return _write(data, along, updates, axis, mode)


def scatter_nd(data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add") -> Tensor:
    """Data with slices written at places that the last dimension of indices holds."""
    depth = indices.shape[-1]
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for dimension in range(depth):
        flat = flat * data.shape[dimension] + _checked(indices[..., dimension], data.shape[dimension], "scatter_nd")
    width = math.prod(data.shape[depth:])
    rows = flat.reshape(-1, 1).expand(-1, width)
    return _write(data.reshape(-1, width), rows, updates.reshape(-1, width), 0, mode).reshape(data.shape)


def _write(data: Tensor, indices: Tensor, updates: Tensor, axis: int, mode: str) -> Tensor:
    ways: dict[str, Callable[[], Tensor]] = {
        "update": lambda: data.scatter(axis, indices, updates),
        "add": lambda: data.scatter_reduce(axis, indices, updates, "sum"),
        "sub": lambda: data.scatter_reduce(axis, indices, -updates, "sum"),
        "mul": lambda: data.scatter_reduce(axis, indices, updates, "prod"),
        "div": lambda: data.scatter_reduce(axis, indices, 1 / updates, "prod"),
        "max": lambda: data.scatter_reduce(axis, indices, updates, "amax"),
        "min": lambda: data.scatter_reduce(axis, indices, updates, "amin"),
    }
    return choose(ways, "scatter", mode=mode)()


def one_hot(
    indices: Tensor, one_hot_vector_size: int, axis: int = -1, on_value: Number = 1, off_value: Number = 0
) -> Tensor:
    """A new axis with on_value where the index says, and off_value elsewhere; all off for an index outside."""
    axis %= indices.ndim + 1
    steps = torch.arange(one_hot_vector_size).reshape([-1 if d == axis else 1 for d in range(indices.ndim + 1)])
    return torch.where(indices.unsqueeze(axis) == steps, on_value, off_value)


def non_zero(x: Tensor) -> Tensor:
    """The coordinates of the elements that are not zero, a row each."""
    return x.nonzero()


OPERATORS: dict[str, Callable[..., Any]] = {
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "gather": gather,
    "gather_nd": gather_nd,
    "gather_along_axis": gather_along_axis,
    "scatter": scatter,
    "scatter_nd": scatter_nd,
    "scatter_along_axis": scatter_along_axis,
    "one_hot": one_hot,
    "non_zero": non_zero,
}
