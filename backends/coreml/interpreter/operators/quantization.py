"""Integers to floats and back, and constants that are stored in a compressed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qdeploy.backends.coreml.interpreter.operators.arguments import Ints
from qdeploy.backends.coreml.interpreter.operators.choice import choose
from qdeploy.backends.coreml.interpreter.package import unpack


def quantize(
    input: Tensor,  # noqa: A002 - the operator's own name for it
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """Clip(round(input / scale) + zero_point), rounding half to even."""
    dtype = choose({"int8": torch.int8, "uint8": torch.uint8}, "quantize", output_dtype=output_dtype)
    steps = torch.round(input / _along(scale, input, axis))
    if zero_point is not None:
        steps = steps + _along(zero_point, input, axis)
    return steps.clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max).to(dtype)


def dequantize(
    input: Tensor,  # noqa: A002 - the operator's own name for it
    scale: Tensor,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """Scale · (input − zero_point)."""
    steps = input.float()
    if zero_point is not None:
        steps = steps - _along(zero_point, input, axis).float()
    return _along(scale, input, axis) * steps


def constexpr_affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Scale · (quantized_data − zero_point), with one scale or one each along an axis."""
    return dequantize(quantized_data, scale, zero_point, axis)


def _along(vector: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """One value, or one each along an axis of x, shaped so that it broadcasts."""
    if vector.numel() == 1 or axis is None:
        return vector.reshape(())
    return vector.reshape([-1 if d == axis % x.ndim else 1 for d in range(x.ndim)])


def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Scale · (data − offset), with one scale and offset a block of equal size."""
    steps = data.float()
    if offset is not None:
        steps = steps - _spread(offset.float(), data)
    return _spread(scale, data) * steps


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """One value a block, repeated over the elements of its block."""
    for axis, size in enumerate(like.shape):
        values = values.repeat_interleave(size // values.shape[axis], axis)
    return values


def constexpr_lut_to_dense(
    indices: Tensor, lut: Tensor, shape: Ints | None = None, vector_axis: int | None = None
) -> Tensor:
    """The entries of a table at indices.

    With a shape (iOS 16), the indices are packed into bytes and the table has one dimension. Without (iOS 18), a table
    [groups…, entries, vector] holds one for each group of indices; vectors lie along `vector_axis` of the result.
    """
    if shape is not None:
        bits, count = lut.shape[0].bit_length() - 1, int(torch.tensor(shape).prod())
        return lut[torch.from_numpy(unpack(indices.numpy(), bits, count)).long()].reshape(shape)
    groups, entries = lut.shape[:-2], lut.flatten(0, -3)
    group = torch.arange(entries.shape[0]).reshape(groups)
    found = entries[_spread(group, indices), indices.long()]
    if vector_axis is None:
        return found.squeeze(-1)
    axis = vector_axis % indices.ndim
    return found.movedim(-1, axis + 1).flatten(axis, axis + 1)


def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    """fp16 stored, fp32 used."""
    choose({"fp32": None}, "constexpr_cast", output_dtype=output_dtype)
    return source_val


OPERATORS: dict[str, Callable[..., Any]] = {
    "quantize": quantize,
    "dequantize": dequantize,
    "constexpr_affine_dequantize": constexpr_affine_dequantize,
    "constexpr_blockwise_shift_scale": constexpr_blockwise_shift_scale,
    "constexpr_lut_to_dense": constexpr_lut_to_dense,
    "constexpr_cast": constexpr_cast,
}
