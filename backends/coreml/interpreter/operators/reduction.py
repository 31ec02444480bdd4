"""Reductions over dimensions (all of them by default), and what sorts or accumulates along one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qdeploy.backends.coreml.interpreter.operators.arguments import Ints


def reduction(function: Callable[[Tensor, Ints, bool], Tensor]) -> Callable[..., Tensor]:
    """An operator that reduces over several dimensions."""

    def operator(x: Tensor, axes: Ints | None = None, *, keep_dims: bool = False) -> Tensor:
        return function(x, tuple(range(x.ndim)) if axes is None else axes, keep_dims)

    return operator


def _prod(x: Tensor, axes: Ints, keep: bool) -> Tensor:  # noqa: FBT001 - as torch's reductions
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def reduce_argmax(x: Tensor, axis: int = -1, *, keep_dims: bool = False) -> Tensor:
    """Where the maximum stands along an axis; which of several equal ones is left open."""
    return x.argmax(axis, keepdim=keep_dims)


def reduce_argmin(x: Tensor, axis: int = -1, *, keep_dims: bool = False) -> Tensor:
    """Where the minimum stands along an axis; which of several equal ones is left open."""
    return x.argmin(axis, keepdim=keep_dims)


def argsort(x: Tensor, axis: int = -1, *, ascending: bool = False) -> Tensor:
    """Where the elements stand in order, the largest first by default."""
    return x.argsort(dim=axis, descending=not ascending, stable=True)


def topk(
    x: Tensor, k: int = 1, axis: int = -1, *, ascending: bool = False, return_indices: bool = True
) -> Tensor | tuple[Tensor, Tensor]:
    """The k largest elements along an axis, or the smallest; −1 for all. They are always sorted."""
    values, indices = x.sort(dim=axis, descending=not ascending, stable=True)
    count = x.shape[axis] if k == -1 else k
    values, indices = values.narrow(axis, 0, count), indices.narrow(axis, 0, count)
    return (values, indices) if return_indices else values


def cumsum(x: Tensor, axis: int = 0, *, exclusive: bool = False, reverse: bool = False) -> Tensor:
    """Running sums along an axis; exclusive ones leave out the element at which they stand."""
    ordered = x.flip(axis) if reverse else x
    if exclusive:
        first, rest = ordered.narrow(axis, 0, 1), ordered.narrow(axis, 0, x.shape[axis] - 1)
        ordered = torch.cat([torch.zeros_like(first), rest], axis)
    sums = ordered.cumsum(axis)
    return sums.flip(axis) if reverse else sums


OPERATORS: dict[str, Callable[..., Any]] = {
    "reduce_l1_norm": reduction(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "reduce_l2_norm": reduction(lambda x, axes, keep: torch.sqrt((x * x).sum(axes, keepdim=keep))),
    "reduce_log_sum": reduction(lambda x, axes, keep: torch.log(x.sum(axes, keepdim=keep))),
    "reduce_log_sum_exp": reduction(lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep)),
    "reduce_max": reduction(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "reduce_mean": reduction(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "reduce_min": reduction(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "reduce_prod": reduction(_prod),
    "reduce_sum": reduction(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    "reduce_sum_square": reduction(lambda x, axes, keep: (x * x).sum(axes, keepdim=keep)),
    "reduce_argmax": reduce_argmax,
    "reduce_argmin": reduce_argmin,
    "argsort": argsort,
    "topk": topk,
    "cumsum": cumsum,
}
