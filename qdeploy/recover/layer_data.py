"""What the steps share that look at one layer after another: the network so far, and what flows through it.

A layer deep in the network sees what the rounding before it has left of its input. Looking at several layers at once is
no way out: each takes back what the layers before have lost, and all of them together would take it back several times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.affine import Affine, fake_quantize
from qdeploy.backend import input_arrays
from qdeploy.errors import InputError
from qdeploy.plan import QuantPlan
from qdeploy.quantize.static import replace_constants
from qdeploy.samples.source import Sample
from qdeploy.session import GraphLevel, open_session

if TYPE_CHECKING:
    import onnx_ir as ir


def weighted_nodes(plan: QuantPlan, graph: ir.Model) -> list[ir.Node]:
    """The nodes whose constant weight the plan rounds, in graph order."""
    return [
        node
        for node in graph.graph
        if questions.weight_of(node) is not None
        and plan.nodes[str(node.name)].quantized
        and questions.name_of(node.inputs[1]) in plan.weights
    ]


def constant_weight(node: ir.Node) -> NDArray[np.float32]:
    """The weight of a weighted node, in its stored layout."""
    weight = questions.weight_of(node)
    assert weight is not None
    return weight


def simulate(plan: QuantPlan) -> ir.Model:
    """The float graph with every quantized tensor on its grid: the numbers of the quantized model, in float operators.

    x ─► Conv(W) ─► y        becomes        x ─► Q ─► DQ ─► Conv(Ŵ) ─► y' ─► Q ─► DQ ─► y

    ONNX Runtime must not optimize it: between pairs it rounds float weights by itself, with one scale a tensor.
    """
    graph = questions.load_graph(plan.model.path)
    replaced = dict(plan.replaced)
    for name, affine in plan.weights.items():
        weight = replaced.get(name, questions.constant(graph.graph.initializers[name]))
        assert weight is not None
        replaced[name] = fake_quantize(weight, affine)
    replace_constants(graph, replace(plan, replaced=replaced))
    values = {value.name: value for value in (*graph.graph.inputs, *(v for n in graph.graph for v in n.outputs))}
    for name, affine in plan.activations.items():
        _put_on_grid(graph, values[name], affine)
    return graph


def _put_on_grid(graph: ir.Model, value: ir.Value, affine: Affine) -> None:
    """Let everything that reads a tensor read it on its grid.

    x ─► …        becomes        x' ─► Q ─► DQ ─► x ─► …

    The tensor on the grid takes the name, but for a graph input's: it is "x/quantized".
    """
    import onnx_ir as ir

    name = questions.name_of(value)
    grid = [
        ir.val(f"{name}/{part}", const_value=ir.tensor(array, name=f"{name}/{part}"))
        for part, array in (("scale", affine.scale), ("zero_point", affine.zero_point))
    ]
    for constant in grid:
        graph.graph.register_initializer(constant)
    quantize = ir.node("QuantizeLinear", [value, *grid], name=f"{name}/quantize")
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *grid], name=f"{name}/dequantize")
    quantize.outputs[0].name = f"{name}/integers"
    quantize.outputs[0].type = ir.TensorType(ir.DataType.from_numpy(affine.zero_point.dtype))
    result = dequantize.outputs[0]
    result.type, result.shape = value.type, value.shape
    value.replace_all_uses_with(result, replace_graph_outputs=True)
    quantize.replace_input_with(0, value)
    if value.is_graph_input():
        result.name = f"{name}/quantized"
    else:
        value.name, result.name = f"{name}/exact", name
    producer = value.producer()
    if producer is not None:
        graph.graph.insert_after(producer, [quantize, dequantize])
    else:
        graph.graph.insert_before(graph.graph[0], [quantize, dequantize])


Found = Mapping[str, NDArray[Any]]
"""Tensors of one sample, by name."""


class Tap:
    """Runs samples through the part of a graph that some of its tensors need, and gives these.

    Args:
        graph: A float graph or a simulation; it is cut off behind the tensors.
        names: The tensors to give; graph inputs may be among them.
        path: Where the cut graph is written.
        graph_level: How far ONNX Runtime may rewrite it.
    """

    def __init__(self, graph: ir.Model, names: Iterable[str], path: Path, graph_level: GraphLevel = "disable") -> None:
        import onnx_ir.passes.common as passes

        values = {questions.name_of(value): value for node in graph.graph for value in node.outputs}
        self._names = [name for name in dict.fromkeys(names) if name in values]
        graph.graph.outputs[:] = [values[name] for name in self._names]
        passes.RemoveUnusedNodesPass()(graph)
        questions.save_graph(graph, path)
        # ONNX Runtime takes no graph without nodes: what is wanted then are the inputs alone.
        self._session = open_session(path, graph_level=graph_level) if self._names else None

    def __call__(self, sample: Sample) -> Found:
        """The tensors by name, and the sample's own.

        Raises:
            InputError: The model fails on the sample.
        """
        inputs = input_arrays(sample.inputs)
        if self._session is None:
            return inputs
        try:
            found = self._session.run(self._names, inputs)
        except Exception as error:  # ORT raises a different class for each of its status codes
            raise InputError(f"The model fails on {sample.origin}: {str(error).strip()}") from error
        return {**inputs, **dict(zip(self._names, found, strict=True))}
