"""DequantizeLinear behind operators that only move values, where a strict target puts it itself."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qdeploy import graph as questions
from qdeploy.quantize.rewrite import graph_of, replace
from qdeploy.scheme import PerTensor, Scheme

if TYPE_CHECKING:
    import onnx_ir as ir

MOVERS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators whose output holds the values of input 0, at other places or in another shape."""


def is_mover(node: ir.Node) -> bool:
    """Whether a node only moves values."""
    return node.op_type in MOVERS and not node.domain


def dequantize_behind_movers(graph: ir.Model) -> None:
    """Move integers, and dequantize behind that; in place, in a graph whose shapes are inferred.

        integers ─► DequantizeLinear ─► Reshape ─► MatMul
        integers ─► Reshape ─► DequantizeLinear ─► MatMul

    The graph is then one to ask questions of, not to save: names repeat, so that messages give those of the model.
    Constants are moved at once. All stays as it is where a Reshape cuts or joins the axis along which scales lie.
    """
    for node in list(graph.graph.all_nodes()):
        read = node.inputs[0] if is_mover(node) else None
        scheme = questions.stored_scheme(read)
        if read is not None and scheme is not None:
            _swap(read, scheme, node)


def _swap(read: ir.Value, scheme: Scheme, mover: ir.Node) -> None:
    import onnx_ir as ir

    dequantize = read.producer()
    assert dequantize is not None
    attributes = dict(dequantize.attributes)
    if not isinstance(scheme.granularity, PerTensor):
        axis = _axis_behind(mover, scheme.granularity.axis)
        if axis is None:
            return
        attributes["axis"] = ir.AttrInt64("axis", axis)
    moved = _moved(dequantize.inputs[0], mover)
    behind = ir.node("DequantizeLinear", [moved, *dequantize.inputs[1:]], attributes, name=dequantize.name)
    producer = moved.producer()
    replace(mover, [behind] if producer is None else [producer, behind])
    if not read.uses() and not read.is_graph_output():
        graph_of(dequantize).remove(dequantize, safe=True)


def _moved(integers: ir.Value | None, mover: ir.Node) -> ir.Value:
    """The integers at their new places: a constant, or what a copy of the mover delivers."""
    import onnx_ir as ir

    assert integers is not None
    array, shape = questions.constant(integers), mover.outputs[0].shape
    if array is not None and shape is not None and shape.is_static():
        turned = array.transpose(_order(mover, array.ndim)) if mover.op_type == "Transpose" else array
        tensor = ir.Tensor(turned.reshape(shape.numpy()), integers.dtype)
        return ir.Value(name=integers.name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    copy = ir.node(mover.op_type, [integers, *mover.inputs[1:]], dict(mover.attributes), name=mover.name)
    (moved,) = copy.outputs
    moved.name, moved.dtype, moved.shape = integers.name, integers.dtype, shape
    return moved


def _order(transpose: ir.Node, rank: int) -> list[int]:
    return [*transpose.attributes.get_ints("perm", tuple(reversed(range(rank))))]


def _axis_behind(mover: ir.Node, axis: int) -> int | None:
    """Where an axis of input 0 lies in the output; None if it is not a whole axis there, or shapes are unknown."""
    shapes = [value.shape for value in (mover.inputs[0], mover.outputs[0]) if value is not None]
    if any(shape is None or not shape.is_static() for shape in shapes):
        return None
    before, after = (shape.numpy() for shape in shapes if shape is not None)
    axis %= len(before)
    if mover.op_type == "Transpose":
        return _order(mover, len(before)).index(axis)
    outside = math.prod(before[:axis])
    places = (i for i, size in enumerate(after) if size == before[axis] and math.prod(after[:i]) == outside)
    return next(places, None)
