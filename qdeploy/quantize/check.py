"""Whether a quantized graph is what was asked for. What fails here is a bug of ours, never the user's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qdeploy import graph as questions
from qdeploy.affine import Affine
from qdeploy.errors import InternalError
from qdeploy.model import FloatModel
from qdeploy.plan import QuantPlan

if TYPE_CHECKING:
    import onnx_ir as ir


def quantized_tensor(node: ir.Node) -> str:
    """The tensor that a QuantizeLinear stores, by its name in the float model: ORT renames what a graph output was."""
    return questions.name_of(node.inputs[0]).removesuffix("_QuantizeLinear_Input")


def check_quantized(graph: ir.Model, plan: QuantPlan) -> None:
    """Every Q with its DQ, just the planned tensors, with the planned scales.

    Raises:
        InternalError: One of these does not hold.
    """
    _refuse(plan.model, [*_pair_problems(graph), *_scale_problems(graph, plan)])


def check_written(graph: ir.Model, model: FloatModel) -> None:
    """Valid ONNX, with the inputs and outputs of the float model.

    Raises:
        InternalError: One of these does not hold.
    """
    _refuse(model, [*_interface_problems(graph, model), *_checker_problems(graph)])


def _refuse(model: FloatModel, problems: list[str]) -> None:
    if problems:
        message = f"the quantized {model.name} is not what was planned: " + "; ".join(problems[:5])
        raise InternalError(message)


def _interface_problems(graph: ir.Model, model: FloatModel) -> list[str]:
    inputs = tuple(questions.spec(v) for v in graph.graph.inputs if not v.is_initializer())
    outputs = tuple(questions.spec(v) for v in graph.graph.outputs)
    problems = []
    if inputs != model.inputs:
        problems.append(f"inputs changed to {[str(s) for s in inputs]}")
    if outputs != model.outputs:
        problems.append(f"outputs changed to {[str(s) for s in outputs]}")
    return problems


def _pair_problems(graph: ir.Model) -> list[str]:
    return [
        f"{node.name} has no DequantizeLinear behind it"
        for node in graph.graph
        if node.op_type == "QuantizeLinear"
        and not any(consumer.op_type == "DequantizeLinear" for consumer in node.outputs[0].consumers())
    ]


def _scale_problems(graph: ir.Model, plan: QuantPlan) -> list[str]:
    """What is quantized and what is stored as integers, with its scales and zero points, against the plan's."""
    activations, constants = {}, {}
    for node in graph.graph:
        source = node.inputs[0] if node.inputs else None
        if node.op_type == "QuantizeLinear":
            activations[quantized_tensor(node)] = node
        elif node.op_type == "DequantizeLinear" and source is not None and source.is_initializer():
            constants[questions.name_of(source).removesuffix("_quantized")] = node
    problems = [
        f"{name!r} is quantized, which nothing asked for" for name in activations if name not in plan.activations
    ]
    for planned, found in ((plan.activations, activations), (plan.weights, constants)):
        problems += [f"{name!r} is not quantized" for name in planned if name not in found]
        wrong = [name for name, affine in planned.items() if name in found and not _uses(found[name], affine)]
        problems += [f"{name!r} has another scale or zero point than planned" for name in wrong]
    return problems


def _uses(node: ir.Node, affine: Affine) -> bool:
    """Whether a QuantizeLinear or DequantizeLinear works with this scale and zero point."""
    scale, zero_point = (questions.constant(value) for value in node.inputs[1:3])
    if scale is None or zero_point is None:
        return False
    same_axis = affine.axis is None or affine.axis == node.attributes.get_int("axis", 1)
    same_scale = np.array_equal(np.ravel(scale), np.ravel(affine.scale))
    return same_axis and same_scale and np.array_equal(np.ravel(zero_point), np.ravel(affine.zero_point))


def _checker_problems(graph: ir.Model) -> list[str]:
    import onnx_ir as ir
    from onnx import checker

    if sum(v.const_value.nbytes for v in graph.graph.initializers.values() if v.const_value) > 1 << 30:
        return []  # the checker takes one protobuf of at most 2 GiB
    try:
        checker.check_model(ir.to_proto(graph))
    except checker.ValidationError as error:
        return [f"the ONNX checker says: {error}"]
    return []
