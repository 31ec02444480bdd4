"""Matrix products and convolutions that sum as ONNX Runtime's CPU kernels on x86 do.

The order of a float sum is no part of a model: each library, and each device, has its own. The interpreter takes that
of the runtime which packages are compared with, so that what is left between the two is the work of the conversion.

Source of the order: MLAS, ONNX Runtime's kernels, in `onnxruntime/core/mlas/lib/sgemm.cpp` and `convolve.cpp`.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as nn

from qdeploy.backends.coreml.interpreter.operators.arguments import Ints

_WIDTH = 512
"""Columns that are summed side by side: their sums, and the rows that are added to them, stay in the fastest cache."""

_STRIP = 1 << 14
"""About how many columns of a convolution are written out at a time; all of an image's could be larger than memory."""

Matrices = NDArray[np.float32]


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def _add_fused(total, factors, rows):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Total += factors · rows, one row after the other, each product and sum rounded once where the CPU can."""
    whole = len(factors) // 4 * 4
    for k in range(0, whole, 4):
        a, b, c, d = factors[k], factors[k + 1], factors[k + 2], factors[k + 3]
        p, q, r, s = rows[k], rows[k + 1], rows[k + 2], rows[k + 3]
        for n in range(total.size):
            total[n] = total[n] + a * p[n] + b * q[n] + c * r[n] + d * s[n]
    for k in range(whole, len(factors)):
        a, p = factors[k], rows[k]
        for n in range(total.size):
            total[n] = total[n] + a * p[n]


@numba.njit(nogil=True, cache=True)
def _add_in_fours(total, factors, rows):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Total += factors · rows, where four products are summed before, and of the last three first two."""
    k = 0
    while k < len(factors):
        a, p = factors[k], rows[k]
        left = len(factors) - k
        if left >= 4:
            b, c, d = factors[k + 1], factors[k + 2], factors[k + 3]
            q, r, s = rows[k + 1], rows[k + 2], rows[k + 3]
            for n in range(total.size):
                total[n] = total[n] + (a * p[n] + b * q[n] + c * r[n] + d * s[n])
            k += 4
        elif left >= 2:
            b, q = factors[k + 1], rows[k + 1]
            for n in range(total.size):
                total[n] = total[n] + (a * p[n] + b * q[n])
            k += 2
        else:
            for n in range(total.size):
                total[n] = total[n] + a * p[n]
            k += 1


@numba.njit(nogil=True, cache=True)
def _products(lefts, rights, block, width):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """[b, m, k] · [b, k, n]: each block of k from zero, then the sum of blocks; one row alone in its own way."""
    batch, rows, depth = lefts.shape
    columns = rights.shape[2]
    result = np.zeros((batch, rows, columns), np.float32)
    partial = np.empty(width, np.float32)
    for b in range(batch):
        for begin in range(0, columns, width):
            end = min(begin + width, columns)
            own = np.ascontiguousarray(rights[b, :, begin:end])
            if rows == 1:
                _add_in_fours(result[b, 0, begin:end], lefts[b, 0], own)
                continue
            part = partial[: end - begin]
            for m in range(rows):
                for k in range(0, depth, block):
                    part[:] = 0
                    _add_fused(part, lefts[b, m, k : k + block], own[k : k + block])
                    result[b, m, begin:end] += part
    return result


def _block(columns: int, depth: int) -> int:
    """How many products are summed at once: 128, more where few columns leave room in the cache."""
    block, width = 128, 128
    while width > 16 and width // 2 >= columns and columns < depth:
        block, width = block * 2, width // 2
    return block


def _contiguous(values: Tensor) -> Matrices:
    array: Matrices = values.contiguous().numpy()
    return array


def product(left: Tensor, right: Tensor) -> Tensor:
    """The product of matrices [..., m, k] and [..., k, n], whose other dimensions broadcast."""
    if left.dtype != torch.float32 or min(left.ndim, right.ndim) < 2:
        return left @ right
    if right.ndim == 2:
        lefts, rights, batch = left.flatten(0, -2)[None], right[None], ()
    else:
        batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        lefts, rights = (each.expand(*batch, *each.shape[-2:]).flatten(0, -3) for each in (left, right))
    found = _products(_contiguous(lefts), _contiguous(rights), _block(right.shape[-1], right.shape[-2]), _WIDTH)
    return torch.from_numpy(found).reshape(*(batch or left.shape[:-2]), left.shape[-2], right.shape[-1])


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strides: Ints,
    padding: Ints,
    dilations: Ints,
    groups: int,
) -> Tensor:
    """As torch's conv1d and conv2d: for each image and group the product of its weights and windows, then the bias."""
    if x.ndim == 3:
        flat = ((1, *strides), (0, *padding), (1, *dilations))
        return convolution(x[:, :, None], weight[:, :, None], bias, *flat, groups)[:, :, 0]
    x = nn.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    kernel = weight.shape[2:]
    height, width = (
        (size - step * (taps - 1) - 1) // stride + 1
        for size, step, taps, stride in zip(x.shape[2:], dilations, kernel, strides, strict=True)
    )
    weights = _contiguous(weight.reshape(groups, len(weight) // groups, -1))
    block = _block(height * width, weights.shape[-1])
    result = torch.empty(len(x), len(weight), height, width)
    rows = max(1, _STRIP // width)
    for begin in range(0, height, rows):
        end = min(begin + rows, height)
        seen = x[:, :, begin * strides[0] : (end - 1) * strides[0] + dilations[0] * (kernel[0] - 1) + 1]
        windows = nn.unfold(seen, tuple(kernel), tuple(dilations), 0, tuple(strides))
        for image, own in zip(result, windows, strict=True):
            columns = _contiguous(own.reshape(groups, -1, own.shape[-1]))
            found = torch.from_numpy(_products(weights, columns, block, _WIDTH))
            image[:, begin:end] = found.reshape(len(weight), end - begin, width)
    return result if bias is None else result + bias.reshape(-1, 1, 1)
