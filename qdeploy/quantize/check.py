"""Whether a quantized graph is what its plan asked for. What fails here is a bug of ours, never the user's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qdeploy import graph as questions
from qdeploy.errors import InternalError
from qdeploy.plan import QuantPlan

if TYPE_CHECKING:
    import onnx_ir as ir


def quantized_tensor(node: ir.Node) -> str:
    """The tensor that a QuantizeLinear stores, by its name in the float model: ORT renames what a graph output was."""
    return questions.name_of(node.inputs[0]).removesuffix("_QuantizeLinear_Input")


def check_quantized(graph: ir.Model, plan: QuantPlan) -> None:
    """Valid ONNX, every Q with its DQ, inputs and outputs unchanged, just the planned tensors, with the planned scales.

    Raises:
        InternalError: One of these does not hold.
    """
    problems = [
        *_interface_problems(graph, plan),
        *_pair_problems(graph),
        *_scale_problems(graph, plan),
        *_checker_problems(graph),
    ]
    if problems:
        message = f"the quantized {plan.model.name} is not what was planned: " + "; ".join(problems[:5])
        raise InternalError(message)


def _interface_problems(graph: ir.Model, plan: QuantPlan) -> list[str]:
    inputs = tuple(questions.spec(v) for v in graph.graph.inputs if not v.is_initializer())
    outputs = tuple(questions.spec(v) for v in graph.graph.outputs)
    problems = []
    if inputs != plan.model.inputs:
        problems.append(f"inputs changed to {[str(s) for s in inputs]}")
    if outputs != plan.model.outputs:
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
    """Scales in the graph against the plan's, matched by the tensor that QuantizeLinear reads."""
    problems = []
    seen = set()
    for node in graph.graph:
        if node.op_type != "QuantizeLinear":
            continue
        name = quantized_tensor(node)
        affine = plan.activations.get(name)
        scale = questions.constant(node.inputs[1])
        if affine is None:
            problems.append(f"{name!r} is quantized, which nothing asked for")
        elif scale is None or not np.array_equal(np.ravel(scale), np.ravel(affine.scale)):
            problems.append(f"{name!r} has another scale than planned")
        seen.add(name)
    problems += [f"{name!r} is not quantized" for name in plan.activations if name not in seen]
    return problems


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
