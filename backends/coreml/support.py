"""What of a graph cannot be lowered: found from the graph alone, all of it at once, before any conversion."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qdeploy.backends.coreml.call import Handler
from qdeploy.backends.coreml.table import TABLE
from qdeploy.errors import InputError
from qdeploy.graph import constant

if TYPE_CHECKING:
    import onnx_ir as ir

LARGEST_RANK = 5
"""Core ML's tensors have at most so many dimensions."""

TYPES = ("FLOAT", "DOUBLE", "INT32", "INT64", "BOOL")
"""What MIL computes with; int64 becomes int32 and double becomes float32."""

STORED = ("INT8", "UINT8")
"""What stands between a QuantizeLinear and a DequantizeLinear."""


FOLDED = frozenset(
    {
        *("DequantizeLinear", "Add", "Sub", "Mul", "Div", "Sqrt", "Pow", "ReduceL2", "ReduceSum"),
        *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity"),
    }
)
"""Operators that MIL computes while it converts: torch writes a weight of weight_norm as a product and a quotient."""


@dataclass(frozen=True)
class Unsupported:
    """A node that cannot be lowered, and why."""

    node: str
    op_type: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node} ({self.op_type}): {self.reason}"


def unsupported(graph: ir.Model) -> list[Unsupported]:
    """Every node that the table does not take, in graph order, with all of its reasons."""
    return [
        Unsupported(str(node.name), node.op_type, "; ".join(reasons))
        for node in graph.graph
        if (reasons := list(dict.fromkeys(_reasons(node))))
    ]


def require_supported(graph: ir.Model) -> None:
    """Refuse a graph with nodes that cannot be lowered.

    Raises:
        InputError: There are some; all of them are named.
    """
    if found := unsupported(graph):
        count = "an operator" if len(found) == 1 else f"{len(found)} operators"
        what = f"Core ML cannot take {count} of this model: {'. '.join(map(str, found))}."
        cure = "Write them in other operators before exporting; qdeploy backends --ops coreml lists what is taken."
        raise InputError(what, cure)


def _reasons(node: ir.Node) -> Iterator[str]:
    if node.domain or node.op_type not in TABLE:
        yield f"the operator {node.domain + '.' if node.domain else ''}{node.op_type} is not in the table"
        return
    handler = TABLE[node.op_type]
    yield from (f"its attribute {name} is not honoured" for name in node.attributes if name not in handler.attributes)
    yield from _of_inputs(node, handler)
    for value in node.outputs[handler.outputs :]:
        if value.uses() or value.is_graph_output():
            yield f"its output {value.name!r} cannot be computed"
    for value in (*node.inputs, *node.outputs):
        if value is not None:
            yield from _of_value(node, value)
    yield from handler.objections(node)


def _of_inputs(node: ir.Node, handler: Handler) -> Iterator[str]:
    """Inputs that must be constant, or computed from shapes, and are not."""
    given = {index: value for index, value in enumerate(node.inputs) if value is not None}
    for index in handler.constants:
        if index in given and not _is_constant(given[index]):
            yield f"its input {index} ({given[index].name!r}) must be constant"
    for index in handler.shapes:
        if index in given and given[index].is_graph_input():
            name = given[index].name
            yield f"its shape ({name!r}) is an input of the model (make it constant, or compute it from shapes)"


def _is_constant(value: ir.Value | None) -> bool:
    """Constant itself, integers behind a DequantizeLinear, or what MIL computes of constants by itself."""
    if value is None or constant(value) is not None:
        return True
    producer = value.producer()
    return producer is not None and producer.op_type in FOLDED and all(map(_is_constant, producer.inputs))


def _of_value(node: ir.Node, value: ir.Value) -> Iterator[str]:
    allowed = TYPES + STORED if node.op_type in ("QuantizeLinear", "DequantizeLinear") else TYPES
    quantizes = node.op_type in ("QuantizeLinear", "DequantizeLinear")
    if value.dtype is not None and value.dtype.name not in allowed and not quantizes:
        yield f"{value.name!r} is {value.dtype.name.lower()}, which Core ML does not compute with"
    if value.shape is None:
        return
    if len(value.shape) > LARGEST_RANK:
        yield f"{value.name!r} has {len(value.shape)} dimensions; Core ML takes at most {LARGEST_RANK}"
    if any(dim == 0 for dim in value.shape) and constant(value) is None:
        yield f"{value.name!r} is empty"
