"""FloatModel → QuantizedModel with integer weights, and activations that are quantized at run time.

The operators are ONNX's own where it has them; the recurrence is ONNX Runtime's. Its `quantize_dynamic` is not called:
it writes every model to disk to infer shapes that are known, takes all Gemms apart, drops an LSTM's layout, and fails
on an LSTM whose weights lie outside the subgraph that reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from qdeploy import graph as questions
from qdeploy.model import FloatModel, QuantizedModel
from qdeploy.plan import quantizable
from qdeploy.quantize import integers
from qdeploy.quantize.integers import IntegerWeights
from qdeploy.quantize.rewrite import ORT_DOMAIN, graph_of, part_of, replace, replace_product, tidy
from qdeploy.quantize.tables import look_up
from qdeploy.quantize.write import write
from qdeploy.scheme import OpRule, QuantContract

if TYPE_CHECKING:
    import onnx_ir as ir


def quantize_dynamic(
    model: FloatModel, contract: QuantContract, directory: Path, keep: Sequence[str] = ()
) -> QuantizedModel:
    """Write a model with integer weights to `directory/model.onnx`, and check it.

    Args:
        model: A prepared model.
        contract: The target's rules: which operators, and the schemes of their weights.
        directory: Where to write.
        keep: Nodes that stay float: "first", "last", or patterns of node or weight names (`*` and `?`).

    Raises:
        InputError: A keep pattern matches nothing.
    """
    graph = questions.load_graph(model.path)
    chosen = quantizable(graph, contract, keep)
    shared = _Shared()
    for node, rule in chosen:
        _REWRITES[node.op_type](node, rule, shared)
    tidy(graph)
    return write(graph, model, contract, [str(node.name) for node, _ in chosen], directory)


@dataclass(frozen=True)
class _Shared:
    """What several nodes read: integer weights, and quantized activations by (tensor, graph of the readers)."""

    weights: IntegerWeights = field(default_factory=IntegerWeights)
    activations: dict[tuple[int, int], Sequence[ir.Value]] = field(default_factory=dict)


def _product(node: ir.Node, rule: OpRule, shared: _Shared) -> None:
    """Multiply by integers. ONNX Runtime fuses the whole into one operator, a Gemm's C included.

    x ─► MatMul(W) ─► y    becomes    x ─► DynamicQuantizeLinear ─► MatMulInteger(Wq) ─► Cast ─► Mul(scales) ─► y
    """
    import onnx_ir as ir

    rounding = integers.transposed if node.attributes.get_int("transB", 0) else integers.plain
    weight, scale, zero_point = shared.weights.of(node, 1, rule, rounding)
    x, x_scale, x_zero_point = _quantized_activation(node, shared)
    product = part_of(node, "MatMulInteger", [x, weight, x_zero_point, zero_point], "product")
    product.name = node.name
    cast = part_of(node, "Cast", product.outputs, "cast", {"to": ir.DataType.FLOAT})
    scales = part_of(node, "Mul", [x_scale, scale], "scales")
    scaled = part_of(node, "Mul", [cast.outputs[0], scales.outputs[0]], "scaled")
    replace_product(node, [product, cast, scales, scaled])


def _lstm(node: ir.Node, rule: OpRule, shared: _Shared) -> None:
    """LSTM(x, W, R, …) ─► y    becomes    DynamicQuantizeLSTM(x, Wq, Rq, …, scales, zero points) ─► y."""
    import onnx_ir as ir

    w, *w_scales = shared.weights.of(node, 1, rule, integers.recurrent)
    r, *r_scales = shared.weights.of(node, 2, rule, integers.recurrent)
    others = [*node.inputs[3:], *[None] * (8 - len(node.inputs))]
    attributes = [attribute for attribute in node.attributes.values() if attribute.name != "layout"]
    inputs = [node.inputs[0], w, r, *others, *w_scales, *r_scales]
    outputs = len(node.outputs)
    replace(node, [ir.Node(ORT_DOMAIN, "DynamicQuantizeLSTM", inputs, attributes, num_outputs=outputs, name=node.name)])


def _table(node: ir.Node, rule: OpRule, shared: _Shared) -> None:
    look_up(node, rule, shared.weights)


_REWRITES: Mapping[str, Callable[[ir.Node, OpRule, _Shared], None]] = MappingProxyType(
    {"MatMul": _product, "Gemm": _product, "LSTM": _lstm, "Gather": _table}
)


def _quantized_activation(node: ir.Node, shared: _Shared) -> Sequence[ir.Value]:
    """Integers, scale and zero point of what a node reads: computed by the first of its readers in a graph."""
    import onnx_ir as ir

    key = (id(node.inputs[0]), id(node.graph))
    if key not in shared.activations:
        name = f"{node.name}/quantize"
        quantize = ir.node("DynamicQuantizeLinear", node.inputs[:1], num_outputs=3, name=name)
        for value, part in zip(quantize.outputs, integers.PARTS, strict=True):
            value.name = f"{name}/{part}"
        graph_of(node).insert_before(node, quantize)
        shared.activations[key] = quantize.outputs
    return shared.activations[key]
