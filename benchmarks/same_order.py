"""Convolutions summed in the order of ONNX Runtime, for `coreml.py --same-order`.

The order of a float sum is no part of a model: each library, and each device, has its own. Here it is taken out of the
comparison, so that whatever is left between a package and its QDQ graph is the work of the conversion.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import numba  # noqa: TID253 - the loops are compiled
import numpy as np
import torch  # noqa: TID253 - the interpreter's tensors
from numpy.typing import NDArray

Matrix = NDArray[np.float32]


@numba.njit(cache=True)
def _product(weight: Matrix, columns: Matrix, block: int) -> Matrix:
    """[outputs, k] · [k, n]: fused multiply-adds along k from zero, one block of it after the other, then their sum.

    A product of two float32 is exact in float64; rounding its sum to float32 is the fused operation, but for ties.
    """
    result = np.zeros((weight.shape[0], columns.shape[1]), np.float32)
    partial = np.empty(columns.shape[1], np.float32)
    for row in range(weight.shape[0]):
        for begin in range(0, weight.shape[1], block):
            partial[:] = 0
            for k in range(begin, min(begin + block, weight.shape[1])):
                factor = np.float64(weight[row, k])
                for n in range(partial.size):
                    partial[n] = np.float32(np.float64(partial[n]) + factor * np.float64(columns[k, n]))
            for n in range(partial.size):
                result[row, n] = result[row, n] + partial[n]
    return result


@numba.njit(cache=True)
def _row_product(weight: Matrix, columns: Matrix) -> Matrix:
    """[1, k] · [k, n], as a depthwise convolution has: of the products four are summed first, of the last ones two."""
    result = np.zeros((1, columns.shape[1]), np.float32)
    for n in range(columns.shape[1]):
        begin = 0
        while begin < weight.shape[1]:
            left = weight.shape[1] - begin
            end = begin + (4 if left >= 4 else min(left, 2))
            partial = np.float32(weight[0, begin] * columns[begin, n])
            for k in range(begin + 1, end):
                partial = np.float32(partial + np.float32(weight[0, k] * columns[k, n]))
            result[0, n] = np.float32(result[0, n] + partial)
            begin = end
    return result


def _block(columns: int, k: int) -> int:
    """How many of k ONNX Runtime's matrix product sums at once: 128, more where few columns leave room in its cache."""
    block, width = 128, 128
    while width > 16 and width // 2 >= columns and columns < k:
        block, width = block * 2, width // 2
    return block


def convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    strides: tuple[int, ...],
    padding: tuple[int, ...],
    dilations: tuple[int, ...],
    groups: int,
) -> torch.Tensor:
    """torch's conv2d as ONNX Runtime's CPU kernel sums it on x86: a product per group, then the bias."""
    unfolded = torch.nn.functional.unfold(x, weight.shape[2:], dilations, tuple(padding), tuple(strides))
    columns = unfolded.numpy().reshape(len(x), groups, -1, unfolded.shape[-1])
    weights = weight.numpy().reshape(groups, len(weight) // groups, -1)
    block = _block(columns.shape[-1], columns.shape[-2])
    found = np.stack(
        [
            _row_product(weights[group], columns[sample, group])
            if weights.shape[1] == 1
            else _product(weights[group], columns[sample, group], block)
            for sample in range(len(x))
            for group in range(groups)
        ]
    )
    height = (x.shape[2] + 2 * padding[0] - dilations[0] * (weight.shape[2] - 1) - 1) // strides[0] + 1
    result = torch.from_numpy(found.reshape(len(x), len(weight), height, -1))
    return result if bias is None else result + bias.reshape(-1, 1, 1)
