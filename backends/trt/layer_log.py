"""What each ONNX node became, read from the builder's detailed log: the one account of an engine that needs no GPU.

The text is no documented format. What cannot be read in it is reported as unknown, never as what was asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qdeploy import graph as questions
from qdeploy.backend import Layer

if TYPE_CHECKING:
    import onnx_ir as ir

_LIST = r"\[\]|\[ \{.*?\}\]"

LINE = re.compile(
    rf"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?P<inputs>{_LIST}), "
    rf"(?:Constants: (?P<constants>{_LIST}), )?Outputs: (?P<outputs>{_LIST}), .*?Metadata: ?(?P<metadata>.*)"
)
TENSOR = re.compile(r"\{ Name: .*?, Dimensions: \[(?P<shape>[-\d,]*)\].*?Datatype: (?P<type>\w+)")
NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=\x1f|\[ONNX Layer: |\s*$)")

TYPES = {
    "Float": "fp32",
    "Half": "fp16",
    "BFloat16": "bf16",
    "FP8": "fp8",
    "FP4": "fp4",
    "E8M0": "e8m0",
    "Int4": "int4",
    "Int8": "int8",
    "Int32": "int32",
    "Int64": "int64",
    "UInt8": "uint8",
    "Bool": "bool",
}
"""The log's names of data types → those of layers.json."""

MULTIPLIES_INTEGERS = frozenset({"correlation", "gemm"})
"""Kinds of layers that compute in the type they read. A "runtime_fusion" that reads integers casts them first."""

GENERATED = "kgen"
"""Kernels that are generated around others: they scale, add, activate, quantize and move."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a built layer: its type, and how many values it has (a dynamic dimension counts as one)."""

    type: str
    size: int


@dataclass(frozen=True)
class BuiltLayer:
    """A layer as the builder describes it.

    Attributes:
        name: Its name in the engine.
        kind: How it is made: "correlation" (a convolution), "gemm", "kgen" (generated), …
        inputs: What it reads that is computed.
        constants: What it reads that is not.
        outputs: What it writes.
        nodes: Names of the ONNX nodes that it does work of.
    """

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    nodes: tuple[str, ...]


def parse_layers(log: str) -> tuple[BuiltLayer, ...]:
    """The layers of a log, in order; none if it is not in the known format throughout."""
    text = log.removeprefix("Layers:\n").partition("\n\nI/O Tensors:")[0]
    lines = [line for line in text.split("\n") if line.strip()]
    found = [LINE.fullmatch(line.strip()) for line in lines]
    return tuple(_built(match) for match in found if match) if all(found) else ()


def _built(match: re.Match[str]) -> BuiltLayer:
    nodes = tuple(dict.fromkeys(NODE.findall(match["metadata"])))
    inputs, constants, outputs = (_tensors(match[part] or "") for part in ("inputs", "constants", "outputs"))
    return BuiltLayer(match["name"], match["kind"], inputs, constants, outputs, nodes)


def _tensors(text: str) -> tuple[Tensor, ...]:
    def size(shape: str) -> int:
        return math.prod(max(int(dim), 1) for dim in shape.split(",") if dim)

    return tuple(Tensor(TYPES.get(m["type"], "unknown"), size(m["shape"])) for m in TENSOR.finditer(text))


def layers(log: str, original: ir.Model) -> tuple[Layer, ...]:
    """What each node of the float model became; "unknown" where the log does not tell.

    Args:
        log: The builder's text, or nothing.
        original: The model whose node names the built graph kept: the float one, or another tool's with QDQ pairs.
    """
    hosts: dict[str, list[BuiltLayer]] = {}
    for built in parse_layers(log):
        for node in built.nodes:
            hosts.setdefault(node, []).append(built)
    nodes = [n for n in original.graph.all_nodes() if any(questions.is_real(value) for value in n.outputs)]
    known = {str(node.name) for node in nodes}
    return tuple(_layer(node, hosts.get(str(node.name), ()), known) for node in nodes)


def _layer(node: ir.Node, hosts: Sequence[BuiltLayer], known: set[str]) -> Layer:
    host = _host(node, hosts)
    name = str(node.name)
    if host is None:
        return Layer(name, node.op_type, "", (), None, (), "unknown")
    weights = _weights(node, host)
    inputs, outputs = (tuple(tensor.type for tensor in part) for part in (host.inputs, host.outputs))
    fused_with = tuple(other for other in host.nodes if other in known and other != name)
    return Layer(name, node.op_type, host.name, inputs, weights, outputs, _precision(node, host, weights), fused_with)


def _has_weight(node: ir.Node) -> bool:
    """Whether a node has a weight: a constant, or what a chain of operators makes of one with constants alone.

    integers ─► DequantizeLinear ─► Transpose ─► MatMul, as other tools write it.
    """
    value = node.inputs[1] if node.op_type in questions.WEIGHTED else None
    while value is not None and questions.constant(value) is None:
        producer = value.producer()
        operands = producer.inputs if producer is not None else ()
        others = (questions.constant(operand) for operand in operands[1:] if operand is not None)
        value = operands[0] if operands and all(other is not None for other in others) else None
    return value is not None or questions.has_weight(node)


def _weights(node: ir.Node, host: BuiltLayer) -> str | None:
    """The type of the constant that a node multiplies by or looks up in; None if it has none.

    A layer may hold several tables: of those as large as the node's own, all must be of one type.
    """
    if _has_weight(node):
        largest = max(host.constants, key=lambda tensor: tensor.size, default=None)
        return largest.type if largest is not None else None
    table = questions.constant(node.inputs[0]) if node.op_type == "Gather" else None
    if table is None or not host.constants:
        return None
    types = {tensor.type for tensor in host.constants if tensor.size == table.size}
    return types.pop() if len(types) == 1 else "unknown"


def _host(node: ir.Node, hosts: Sequence[BuiltLayer]) -> BuiltLayer | None:
    """The layer that does a node's own work, of those that do some of it: generated ones surround the others."""
    if _has_weight(node):
        own = [host for host in hosts if host.kind != GENERATED] or [host for host in hosts if host.constants]
        return own[0] if own else None
    return hosts[-1] if hosts else None


def _precision(node: ir.Node, host: BuiltLayer, weights: str | None) -> str:
    """What a node computes in: integers where its layer multiplies integers, or moves nothing else.

    A layer that multiplies by a weight without having it as a constant reads it as another layer unpacked it. Integers
    of 4 bits are those of weights alone: what a layer has as such a constant, it unpacks itself.
    """
    if weights in ("int4", "unknown"):
        return weights
    reads, written = ([tensor.type for tensor in part] for part in (host.inputs, host.outputs))
    if _has_weight(node):
        in_integers = weights == "int8" == reads[0] if reads and host.kind in MULTIPLIES_INTEGERS else False
        return "int8" if in_integers else _float([*reads, *written], weights)
    if {*reads, *written} == {"int8"} and node.op_type in ("MaxPool", "Concat", "Reshape", "Transpose"):
        return "int8"
    return _float([*reads, *written], None)


def _float(types: Sequence[str], weights: str | None) -> str:
    """The first floating-point type: of the weights, of what a layer reads, of what it writes."""
    return next((kind for kind in (weights, *types) if kind in ("fp32", "fp16", "bf16")), "unknown")
