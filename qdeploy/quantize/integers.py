"""Constant weights as integers, stored beside the floats that they replace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.affine import Affine, affine_from_tensor, affine_in_blocks, quantize
from qdeploy.errors import InternalError
from qdeploy.scheme import OpRule, PerBlock, PerChannel, Scheme

if TYPE_CHECKING:
    import onnx_ir as ir

Integers = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""The integers of a weight, their scale and their zero point."""

PARTS = ("integers", "scale", "zero_point")

Rounding = Callable[[NDArray[np.float32], Scheme, NDArray[np.float32]], Integers]
"""Makes integers of a weight under a scheme: the weight gives the scales, and the values that are then stored are its
own, or those on the same grid to which a recovery step has rounded it."""


def affine_of(weight: NDArray[np.float32], scheme: Scheme) -> Affine:
    """Scales and zero points that a scheme gives a weight."""
    match scheme.granularity:
        case PerBlock(size, axis):
            return affine_in_blocks(
                weight, scheme.integer, symmetric=scheme.symmetric, axis=axis % weight.ndim, block=size
            )
        case PerChannel(axis):
            return affine_from_tensor(weight, scheme.integer, symmetric=scheme.symmetric, axis=axis % weight.ndim)
    return affine_from_tensor(weight, scheme.integer, symmetric=scheme.symmetric)


def plain(weight: NDArray[np.float32], scheme: Scheme, values: NDArray[np.float32]) -> Integers:
    """A weight as it lies; scale and zero point have one value a channel, or no dimension without channels.

    In blocks they have the weight's shape, with one value for each block along its axis, of which the last may be short
    (ONNX, DequantizeLinear, block_size). 4-bit integers are in the type that ONNX packs two to a byte.
    """
    affine = affine_of(weight, scheme)
    return _packed(quantize(values, affine), scheme), affine.scale, _packed(affine.zero_point, scheme)


def _packed(integers: NDArray[Any], scheme: Scheme) -> NDArray[Any]:
    if scheme.integer.bits != 4:
        return integers
    import ml_dtypes

    return integers.astype(ml_dtypes.int4 if scheme.integer.signed else ml_dtypes.uint4)


def transposed(weight: NDArray[np.float32], scheme: Scheme, values: NDArray[np.float32]) -> Integers:
    """The weight of a Gemm with transB=1, as [inputs, outputs]."""
    return plain(weight.T, scheme, values.T)


def rows(weight: NDArray[np.float32], scheme: Scheme, values: NDArray[np.float32]) -> Integers:
    """A table as it lies; scales have its rank, so that those of some rows scale these rows."""
    stored, scale, zero_point = plain(weight, scheme, values)
    return stored, scale.reshape(-1, *[1] * (weight.ndim - 1)), zero_point


def blocks(weight: NDArray[np.float32], scheme: Scheme, values: NDArray[np.float32]) -> Integers:
    """A weight [inputs, outputs] in the layout of ONNX Runtime's MatMulNBits: [outputs, blocks of inputs, bytes].

    The last block is filled up with zeros. Integers have no sign (symmetric ones lie around the middle of the grid);
    those of 4 bits are two to a byte, the first in the lower half, and so are zero points, [outputs, bytes]. Scales are
    [outputs, blocks] (onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulNBits).
    """
    assert isinstance(scheme.granularity, PerBlock)
    affine, size, bits = affine_of(weight, scheme), scheme.granularity.size, scheme.integer.bits
    middle = 1 << (bits - 1) if scheme.integer.signed else 0
    filled = np.pad(values, ((0, -len(values) % size), (0, 0)))
    stored = (quantize(filled, affine).astype(np.int16) + middle).astype(np.uint8)
    zero_points = (affine.zero_point.T.astype(np.int16) + middle).astype(np.uint8)
    return _bytes(stored.T.reshape(weight.shape[1], -1, size), bits), affine.scale.T, _bytes(zero_points, bits)


def _bytes(integers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Integers of 8 bits as they are, of 4 bits two to a byte along the last axis."""
    if bits == 8:
        return integers
    even = np.pad(integers, [(0, 0)] * (integers.ndim - 1) + [(0, integers.shape[-1] % 2)])
    return (even[..., ::2] | even[..., 1::2] << 4).astype(np.uint8)


def transposed_blocks(weight: NDArray[np.float32], scheme: Scheme, values: NDArray[np.float32]) -> Integers:
    """The weight of a Gemm with transB=1, in blocks."""
    return blocks(weight.T, scheme, values.T)


def recurrent(weight: NDArray[np.float32], scheme: Scheme, values: NDArray[np.float32]) -> Integers:
    """A recurrence's weight [directions, gates, inputs] as [directions, inputs, gates], each direction by itself.

    Scales are [directions, gates], or [directions] with one a tensor.
    """
    axis = None if not isinstance(scheme.granularity, PerChannel) else 0
    affines = [affine_from_tensor(each, scheme.integer, symmetric=scheme.symmetric, axis=axis) for each in weight]
    integers = [quantize(each, affine).T for each, affine in zip(values, affines, strict=True)]
    return np.stack(integers), np.stack([a.scale for a in affines]), np.stack([a.zero_point for a in affines])


class IntegerWeights:
    """The integer constants of one model: however many nodes read a weight, it is stored once for each rounding.

    Args:
        replaced: Values to store instead of a weight's own, by the weight's name: on its grid.
    """

    def __init__(self, replaced: Mapping[str, NDArray[np.float32]] = MappingProxyType({})) -> None:
        self._replaced = replaced
        self._stored: dict[tuple[int, Rounding], list[ir.Value]] = {}

    def of(self, node: ir.Node, index: int, rule: OpRule, rounding: Rounding) -> list[ir.Value]:
        """Constants for the integers, the scale and the zero point of a node's weight, in the graph that holds it.

        Args:
            node: The node, still float.
            index: Which of its inputs is the weight.
            rule: Its rule, with the weight's scheme.
            rounding: Turns the weight into integers.
        """
        weight, scheme = node.inputs[index], rule.inputs[index]
        array = questions.constant(weight)
        if weight is None or array is None or scheme is None:
            message = f"{node.name} has no constant weight at input {index} to quantize"
            raise InternalError(message)
        key = (id(weight), rounding)
        if key not in self._stored:
            name = f"{weight.name}/{rounding.__name__}"
            values = self._replaced.get(questions.name_of(weight), array)
            self._stored[key] = _constants(weight, name, rounding(array, scheme, values))
        return self._stored[key]


def _constants(beside: ir.Value, name: str, integers: Integers) -> list[ir.Value]:
    import onnx_ir as ir

    values = []
    for part, array in zip(PARTS, integers, strict=True):
        tensor = ir.tensor(np.ascontiguousarray(array), name=f"{name}/{part}")
        value = ir.val(tensor.name, const_value=tensor)
        assert beside.graph is not None
        beside.graph.register_initializer(value)
        values.append(value)
    return values
