"""Nodes in the place of others, and what is left over then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

ORT_DOMAIN = "com.microsoft"
"""Operators of ONNX Runtime's own."""


def part_of(
    origin: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    part: str,
    attributes: Mapping[str, Any] | None = None,
) -> ir.Node:
    """A node of one output that does a part of another's work; the part names both."""
    import onnx_ir as ir

    node = ir.node(op_type, inputs, attributes, name=f"{origin.name}/{part}")
    node.outputs[0].name = node.name
    return node


def replace_product(node: ir.Node, chain: Sequence[ir.Node]) -> None:
    """Put a chain of nodes in the place of a MatMul or a Gemm; a Gemm's C is added behind it."""
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        chain = [*chain, part_of(node, "Add", [chain[-1].outputs[0], node.inputs[2]], "sum")]
    replace(node, chain)


def replace(node: ir.Node, chain: Sequence[ir.Node]) -> None:
    """Put a chain of nodes in the place of one; its outputs keep their names."""
    import onnx_ir as ir

    outputs = chain[-1].outputs
    ir.convenience.replace_nodes_and_values(graph_of(node), node, [node], chain, node.outputs, outputs)


def graph_of(node: ir.Node) -> ir.Graph | ir.Function:
    """The graph or subgraph that a node stands in."""
    assert node.graph is not None
    return node.graph


def tidy(graph: ir.Model) -> None:
    """Remove the nodes and constants that nothing reads, and name the operator sets that are used."""
    import onnx_ir.passes.common as passes

    passes.RemoveUnusedNodesPass()(graph)
    for each in graph.graphs():  # the pass leaves the constants of subgraphs
        for name, value in list(each.initializers.items()):
            if not value.uses() and not value.is_graph_input() and not value.is_graph_output():
                del each.initializers[name]
    if any(node.domain == ORT_DOMAIN for node in graph.graph.all_nodes()):
        graph.opset_imports[ORT_DOMAIN] = 1
