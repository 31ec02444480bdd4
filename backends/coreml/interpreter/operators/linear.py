"""Convolutions and matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nn

from qdeploy.backends.coreml.interpreter.operators.arguments import Ints, Tensors
from qdeploy.backends.coreml.interpreter.operators.products import convolution, product
from qdeploy.backends.coreml.interpreter.operators.windows import paddings, two_sided
from qdeploy.errors import UnavailableError

_CONVOLUTIONS = {3: convolution, 4: convolution, 5: nn.conv3d}
_TRANSPOSED = {3: nn.conv_transpose1d, 4: nn.conv_transpose2d, 5: nn.conv_transpose3d}


def conv(  # noqa: PLR0913 - the operator's own arguments
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    """Convolution of [n, channels, spatial…] with [outputs, channels/groups, kernel…]."""
    rank = x.ndim - 2
    strides, dilations = strides or (1,) * rank, dilations or (1,) * rank
    sizes = _dilated(weight, dilations)
    before_after = paddings("conv", pad_type, pad, x.shape[2:], sizes, strides)
    if all(before == after for before, after in before_after):
        symmetric = [before for before, _ in before_after]
    else:
        x, symmetric = nn.pad(x, two_sided(before_after)), [0] * rank
    return _CONVOLUTIONS[x.ndim](x, weight, bias, strides, symmetric, dilations, groups)


def conv_transpose(  # noqa: PLR0913 - the operator's own arguments
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pad: Ints | None = None,
    output_shape: Ints | None = None,
    pad_type: str = "valid",
    strides: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    """Transposed convolution: the whole of it, from which padding cuts its width off each side.

    Where `output_shape` asks for less than is left, the rest falls off the end. With same, that padding is cut which
    would take the output back to the input's size, an odd element of it after.
    """
    rank = x.ndim - 2
    strides, dilations = strides or (1,) * rank, dilations or (1,) * rank
    whole = _TRANSPOSED[x.ndim](x, weight, bias, strides, 0, 0, groups, dilations)
    before = [0] * rank if pad is None or pad_type != "custom" else list(pad[::2])
    after = [0] * rank if pad is None or pad_type != "custom" else list(pad[1::2])
    sizes = [n - b - a for n, b, a in zip(whole.shape[2:], before, after, strict=True)]
    if output_shape is not None:
        sizes = list(output_shape[2:])
    elif pad_type == "same":
        sizes = [n * stride for n, stride in zip(x.shape[2:], strides, strict=True)]
    if pad_type in ("same", "same_lower"):
        surplus = [n - size for n, size in zip(whole.shape[2:], sizes, strict=True)]
        before = [n // 2 if pad_type == "same" else n - n // 2 for n in surplus]
    for axis, (start, size) in enumerate(zip(before, sizes, strict=True), 2):
        if start < 0 or start + size > whole.shape[axis]:
            what = f"The interpreter has no conv_transpose that fills {size} elements from {whole.shape[axis]}."
            raise UnavailableError(what, "Pad its output with an operator of its own.")
        whole = whole.narrow(axis, start, size)
    return whole


def _dilated(weight: Tensor, dilations: Ints) -> Ints:
    """How many elements a kernel spans in each spatial dimension."""
    return tuple((size - 1) * step + 1 for size, step in zip(weight.shape[2:], dilations, strict=True))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product x · weightᵀ + bias, with the weight as [outputs, inputs]."""
    result = product(x, weight.mT)
    return result if bias is None else result + bias


def matmul(x: Tensor, y: Tensor, *, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    """The matrix product over the last two dimensions, as numpy's; a vector cannot be transposed and stays as it is."""
    left = x.mT if transpose_x and x.ndim > 1 else x
    right = y.mT if transpose_y and y.ndim > 1 else y
    return product(left, right)


def einsum(values: Tensors, equation: str) -> Tensor:
    """Einstein's sum of two tensors."""
    return torch.einsum(equation, *values)


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(query · keyᵀ / √E + mask) · value; a boolean mask is true where a key takes part."""
    scores = product(query, key.mT) / query.shape[-1] ** 0.5
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return product(torch.softmax(scores, -1), value)


OPERATORS: dict[str, Callable[..., Any]] = {
    "conv": conv,
    "conv_transpose": conv_transpose,
    "linear": linear,
    "matmul": matmul,
    "einsum": einsum,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
