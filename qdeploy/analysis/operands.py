"""The layers of a plan, and how the operands of each are stored: as integers, or in float16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.affine import Affine, fake_quantize
from qdeploy.errors import InputError
from qdeploy.plan import QuantPlan, matching_rule
from qdeploy.scheme import OpRule, QuantContract, Scheme

if TYPE_CHECKING:
    import onnx_ir as ir

HALF_LIMIT = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Layer:
    """A quantized operator with the bias behind it and the activation fused into it.

    Attributes:
        name: Of the operator's node.
        op_type: Its ONNX operator.
        members: Names of all nodes that belong to it.
        result: Name of the tensor that it leaves.
        channel_axis: Of the result, if it has output channels.
        weights: Names of the quantized constants that it reads.
        inputs: Names of the quantized activations that it reads.
    """

    name: str
    op_type: str
    members: frozenset[str]
    result: str
    channel_axis: int | None
    weights: tuple[str, ...]
    inputs: tuple[str, ...]

    @property
    def weight(self) -> str:
        """The first of its constants, by which a user may know it; empty without any."""
        return self.weights[0] if self.weights else ""


def layers_of(graph: ir.Model, plan: QuantPlan) -> tuple[Layer, ...]:
    """The plan's quantized operators that read something quantized, in graph order.

    Operators that only move values, and activations that others absorb, round nothing of their own.

    Args:
        graph: Of the plan's model.
        plan: What is quantized, and how.

    Raises:
        InputError: There are none.
    """
    absorbed = {str(a.name) for node in graph.graph if (a := questions.fused_activation(node)) is not None}
    found = []
    for node in graph.graph:
        name = str(node.name)
        if not plan.nodes[name].quantized or name in absorbed or moves_values(node, plan):
            continue
        read = dict.fromkeys(questions.name_of(value) for value in node.inputs if value is not None)
        weights = tuple(each for each in read if each in plan.weights)
        inputs = tuple(each for each in read if each in plan.activations)
        if weights or inputs:
            members, result = _members(node, plan)
            axis = questions.output_channel_axis(node)
            found.append(Layer(name, node.op_type, members, questions.name_of(result), axis, weights, inputs))
    if not found:
        what = f"{plan.contract.target}:{plan.contract.precision} quantizes nothing of this model."
        raise InputError(what, "Look at its rules: qdeploy backends --ops NAME.")
    return tuple(found)


def moves_values(node: ir.Node, plan: QuantPlan) -> bool:
    """Whether an operator hands on integers as they are, so that nothing is rounded between input and output."""
    rule = matching_rule(plan.contract, node, plan.activations.keys())
    return plan.nodes[str(node.name)].quantized and rule is not None and rule.moves_values


def _members(node: ir.Node, plan: QuantPlan) -> tuple[frozenset[str], ir.Value]:
    """A layer's nodes, and what the last of them leaves."""
    place = questions.bias_input(node) if str(node.name) in plan.biases else None
    last = place[0] if place else node
    activation = questions.fused_activation(last)
    nodes = [node, last, *([activation] if activation is not None else [])]
    return frozenset(str(each.name) for each in nodes), nodes[-1].outputs[0]


@dataclass(frozen=True)
class Storage:
    """What becomes of operands when they are stored in a narrower type.

    Attributes:
        activations: The integers of each activation, by tensor name; None stands for float16.
        weights: Each constant as it comes back, by initializer name.
        biases: Biases that are put right for the weights of a node: (reading node, input index) → (that node, bias).
    """

    activations: Mapping[str, Affine | None]
    weights: Mapping[str, NDArray[np.float32]]
    biases: Mapping[tuple[str, int], tuple[str, NDArray[np.float32]]]


def stored_as_planned(graph: ir.Model, plan: QuantPlan) -> Storage:
    """Operands as a plan stores them, with the weights and biases that its recovery steps gave."""
    weights = {
        name: fake_quantize(plan.replaced.get(name, array), plan.weights[name])
        for name, array in _constants(graph, plan)
    }
    biases = {}
    for node in graph.graph:
        if str(node.name) in plan.biases:
            reader, index = questions.bias_input(node) or (node, 2)
            array = plan.biases[str(node.name)]
            old = questions.constant(reader.inputs[index]) if index < len(reader.inputs) else None
            shaped = array.reshape(old.shape) if old is not None and old.size == array.size else array
            biases[str(reader.name), index] = (str(node.name), shaped)
    return Storage(plan.activations, weights, biases)


def stored_in_half(graph: ir.Model, plan: QuantPlan) -> Storage:
    """The operands that a plan quantizes in float16 instead; constants beyond its range are cut to it."""
    weights = {
        name: np.clip(array, -HALF_LIMIT, HALF_LIMIT).astype(np.float16).astype(np.float32)
        for name, array in _constants(graph, plan)
    }
    return Storage(dict.fromkeys(plan.activations), weights, {})


def _constants(graph: ir.Model, plan: QuantPlan) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for name, value in graph.graph.initializers.items():
        array = questions.constant(value)
        if name in plan.weights and array is not None:
            yield str(name), array


def at_bits(contract: QuantContract, bits: int) -> QuantContract:
    """The same rules with integers of another width; then biases stay float, since none was planned for it."""

    def widened(scheme: Scheme | None) -> Scheme | None:
        return scheme and replace(scheme, integer=replace(scheme.integer, bits=bits))

    def changed(rule: OpRule) -> OpRule:
        inputs = {index: widened(scheme) for index, scheme in rule.inputs.items()}
        return replace(rule, inputs=inputs, output=widened(rule.output))

    rules = tuple(map(changed, contract.rules))
    return contract if rules == contract.rules else replace(contract, bias="float", rules=rules)


def takes_bits(contract: QuantContract, bits: int) -> bool:
    """Whether a contract has integers of a width anywhere."""
    schemes = (scheme for rule in contract.rules for scheme in (*rule.inputs.values(), rule.output))
    return any(scheme.integer.bits == bits for scheme in schemes if scheme is not None)
