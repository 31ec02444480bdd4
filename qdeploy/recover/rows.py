"""A weighted layer as products of small matrices: rows of its input and output at some of its output positions.

A convolution is x · W for every output position, with x the patch of the input under the kernel. A few positions of
each sample stand for the whole feature map, whose patches would take hundreds of times its memory.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions

if TYPE_CHECKING:
    import onnx_ir as ir

Positions = NDArray[np.integer[Any]]
"""Flat indices into a layer's output positions (batch × space, or all axes but the last)."""


def is_product(node: ir.Node) -> bool:
    """Whether a node multiplies by one constant matrix a group: no ConvTranspose does, nor a batch of weights."""
    weight = questions.weight_of(node)
    if weight is None or node.op_type == "ConvTranspose" or (node.op_type == "MatMul" and weight.ndim > 2):
        return False
    named = node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return not named and (bias is None or questions.bias_input(node) is not None)


def matrices(node: ir.Node, stored: NDArray[Any]) -> NDArray[Any]:
    """An array in the layout of a node's weight as [groups, inputs, outputs]."""
    if not _outputs_first(node):
        return stored[None]
    groups = _groups(node)
    return stored.reshape(groups, stored.shape[0] // groups, -1).transpose(0, 2, 1)


def stored_layout(node: ir.Node, products: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """What `matrices` made, in the layout of the node's weight again."""
    return products.transpose(0, 2, 1).reshape(shape) if _outputs_first(node) else products[0]


def position_count(node: ir.Node, output: NDArray[Any]) -> int:
    """How many positions a layer's output has."""
    return int(output.size // output.shape[1 if node.op_type == "Conv" else -1])


def output_rows(node: ir.Node, output: NDArray[np.float32], chosen: Positions) -> NDArray[np.float32]:
    """A layer's output at the chosen positions, [groups, rows, outputs]."""
    if node.op_type == "Conv":
        batch, channels = output.shape[:2]
        item, place = np.divmod(chosen, math.prod(output.shape[2:]))
        rows = output.reshape(batch, channels, -1)[item, :, place]
    else:
        rows = output.reshape(-1, output.shape[-1])[chosen]
    return rows.reshape(chosen.size, _groups(node), -1).transpose(1, 0, 2)


def input_rows(
    node: ir.Node, source: NDArray[np.float32], chosen: Positions, output_shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """What a layer multiplies by its weight for each chosen output position, [groups, rows, inputs]."""
    if node.op_type == "Conv":
        rows = _patches(node, source, chosen, output_shape[2:])
    else:
        matrix = source.T if node.attributes.get_int("transA", 0) else source
        rows = matrix.reshape(-1, matrix.shape[-1])[chosen]
    return rows.reshape(chosen.size, _groups(node), -1).transpose(1, 0, 2)


def _patches(
    node: ir.Node, source: NDArray[np.float32], chosen: Positions, space: tuple[int, ...]
) -> NDArray[np.float32]:
    """Patches under the kernel, [rows, channels, kernel …]; outside of the source are zeros."""
    weight = questions.weight_of(node)
    assert weight is not None
    kernel = weight.shape[2:]
    strides = node.attributes.get_ints("strides", [1] * len(kernel))
    dilations = node.attributes.get_ints("dilations", [1] * len(kernel))
    pads = node.attributes.get_ints("pads", [0] * (2 * len(kernel)))
    widths = [(0, 0), (0, 0), *zip(pads[: len(kernel)], pads[len(kernel) :], strict=True)]
    item, *corner = np.unravel_index(chosen, (source.shape[0], *space))
    axes = len(kernel) + 2
    index = [_along(item, 0, axes), _along(np.arange(source.shape[1]), 1, axes)]
    for axis, (start, stride, size, dilation) in enumerate(zip(corner, strides, kernel, dilations, strict=True), 2):
        index.append(_along(start * stride, 0, axes) + _along(np.arange(size) * dilation, axis, axes))
    patches: NDArray[np.float32] = np.pad(source, widths)[tuple(index)]
    return patches


def _along(values: NDArray[np.integer[Any]], axis: int, axes: int) -> NDArray[np.integer[Any]]:
    return values.reshape([-1 if i == axis else 1 for i in range(axes)])


def _groups(node: ir.Node) -> int:
    return node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1


def _outputs_first(node: ir.Node) -> bool:
    return node.op_type == "Conv" or bool(node.attributes.get_int("transB", 0))
