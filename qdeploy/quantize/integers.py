"""Constant weights as integers, stored beside the floats that they replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.affine import affine_from_tensor, quantize
from qdeploy.errors import InternalError
from qdeploy.scheme import OpRule, PerBlock, PerChannel, Scheme

if TYPE_CHECKING:
    import onnx_ir as ir

Integers = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""The integers of a weight, their scale and their zero point."""

PARTS = ("integers", "scale", "zero_point")

Rounding = Callable[[NDArray[np.float32], Scheme], Integers]


def plain(weight: NDArray[np.float32], scheme: Scheme) -> Integers:
    """A weight as it lies; scale and zero point have one value a channel, or no dimension without channels."""
    axis = scheme.granularity.axis % weight.ndim if isinstance(scheme.granularity, PerChannel) else None
    affine = affine_from_tensor(weight, scheme.integer, symmetric=scheme.symmetric, axis=axis)
    return quantize(weight, affine), affine.scale, affine.zero_point


def transposed(weight: NDArray[np.float32], scheme: Scheme) -> Integers:
    """The weight of a Gemm with transB=1, as [inputs, outputs]."""
    return plain(weight.T, scheme)


def blocks(weight: NDArray[np.float32], scheme: Scheme) -> Integers:
    """A weight [inputs, outputs] in the layout of ONNX Runtime's MatMulNBits: [outputs, blocks of inputs, size].

    The last block is filled up with zeros; the integers are stored with an offset of 128. Scales are [outputs, blocks].
    """
    assert isinstance(scheme.granularity, PerBlock)
    size = scheme.granularity.size
    inputs, outputs = weight.shape
    filled = np.pad(weight, ((0, -inputs % size), (0, 0))).T.reshape(-1, size)
    affine = affine_from_tensor(filled, scheme.integer, symmetric=True, axis=0)
    stored = (quantize(filled, affine) + np.int16(128)).astype(np.uint8)
    scale, zero_point = (each.reshape(outputs, -1) for each in (affine.scale, affine.zero_point))
    return stored.reshape(outputs, -1, size), scale, zero_point


def transposed_blocks(weight: NDArray[np.float32], scheme: Scheme) -> Integers:
    """The weight of a Gemm with transB=1, in blocks."""
    return blocks(weight.T, scheme)


def recurrent(weight: NDArray[np.float32], scheme: Scheme) -> Integers:
    """A recurrence's weight [directions, gates, inputs] as [directions, inputs, gates], each direction by itself.

    Scales are [directions, gates], or [directions] with one a tensor.
    """
    axis = None if not isinstance(scheme.granularity, PerChannel) else 0
    affines = [affine_from_tensor(each, scheme.integer, symmetric=scheme.symmetric, axis=axis) for each in weight]
    integers = [quantize(each, affine).T for each, affine in zip(weight, affines, strict=True)]
    return np.stack(integers), np.stack([a.scale for a in affines]), np.stack([a.zero_point for a in affines])


class IntegerWeights:
    """The integer constants of one model: however many nodes read a weight, it is stored once for each rounding."""

    def __init__(self) -> None:
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
            self._stored[key] = _constants(weight, name, rounding(array, scheme))
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
