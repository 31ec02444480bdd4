"""Marks: labels that tensors of a torch module bear until they are tensors of an ONNX graph.

Names are lost on the way from torch to ONNX, and structure is not. A tensor that a module passes through `mark` is
written with a node of a domain of our own, and `take_marks` removes these nodes and says which tensor each stood on:

    x ─► Mark(label) ─► Conv ─► …        becomes        x ─► Conv ─► …        and {"x": label}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.errors import InternalError
from qdeploy.graph import load_graph, name_of, save_graph

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN, OPERATOR = "qdeploy", "Mark"


def mark(value: Any, label: str) -> Any:
    """The value itself; while torch writes an ONNX graph, with its label if it is a tensor of real values."""
    import torch

    if not torch.onnx.is_in_onnx_export() or not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    name, attributes = f"{DOMAIN}::{OPERATOR}", {"label": label}
    return torch.onnx.ops.symbolic(name, (value,), attributes, dtype=value.dtype, shape=value.shape, version=1)


def take_marks(path: Path) -> Mapping[str, str]:
    """Remove the marks from a file; tensor name → label. Of several labels of one tensor the first stays."""
    graph = load_graph(path)
    marked: list[tuple[ir.Value, str]] = []
    for node in list(graph.graph):
        if node.domain == DOMAIN:
            label = node.attributes.get_string("label")
            marked += [(value, label) for value in _taken(graph, node)]
    graph.opset_imports.pop(DOMAIN, None)
    save_graph(graph, path)
    return {name_of(value): label for value, label in reversed(marked)}


def _taken(graph: ir.Model, node: ir.Node) -> list[ir.Value]:
    """Remove one mark; what it stood on, and that turned round where it is the weight of a MatMul."""
    source, marked = node.inputs[0], node.outputs[0]
    if source is None:
        message = f"the mark {node.name!r} stands on nothing"
        raise InternalError(message)
    turned = [reader.outputs[0] for reader in marked.consumers() if reader.op_type == "Transpose"]
    labelled = [source, *turned] if source.is_initializer() else [source]
    if marked.is_graph_output() and (source.is_graph_input() or source.is_initializer() or source.is_graph_output()):
        node.domain, node.op_type = "", "Identity"  # an output needs a name of its own
        node.attributes.clear()
        return labelled
    if marked.is_graph_output():
        source.name, marked.name = marked.name, f"{marked.name}/marked"
    marked.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.graph.remove(node, safe=True)
    return labelled
