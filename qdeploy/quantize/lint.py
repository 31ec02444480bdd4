"""Whether a quantized ONNX model, ours or another tool's, keeps a target's contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.affine import IntegerType
from qdeploy.plan import matching_rule
from qdeploy.quantize.movers import dequantize_behind_movers
from qdeploy.quantize.pairs import pair_problems
from qdeploy.scheme import Form, Granularity, OpRule, PerBlock, PerChannel, PerTensor, QuantContract, Scheme

if TYPE_CHECKING:
    import onnx_ir as ir

NOT_QDQ = frozenset(
    {
        *("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"),
        *("QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax"),
        *("QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearReduceMean", "QGemm", "QAttention"),
        *("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "MatMulNBits"),
        "GatherBlockQuantized",
    }
)
"""Operators that compute on integers themselves, of ONNX and of ONNX Runtime."""

OWN: Mapping[Form, Mapping[str, str]] = MappingProxyType(
    {
        Form.DYNAMIC: {"DynamicQuantizeLinear": "", "MatMulInteger": "MatMul", "DynamicQuantizeLSTM": "LSTM"},
        Form.WEIGHTS: {"MatMulNBits": "MatMul", "GatherBlockQuantized": "Gather"},
        Form.WEIGHT_QDQ: {},
    }
)
"""The integer operators that a form consists of → the float operator whose rule they follow."""

TAKEN: Mapping[Form, str] = MappingProxyType(
    {
        Form.FLOAT: "float operators",
        Form.QDQ: "float operators between QDQ pairs",
        Form.DYNAMIC: "MatMulInteger and DynamicQuantizeLSTM, on what DynamicQuantizeLinear delivers",
        Form.WEIGHTS: "MatMulNBits",
        Form.WEIGHT_QDQ: "float operators with weights behind DequantizeLinear",
        Form.HALF: "float operators",
        Form.FLOAT16: "float operators",
        Form.QDQ_FLOAT16: "float operators between QDQ pairs",
    }
)
"""What a target is given, by its contract's form."""

_AGAIN = "Quantize the float model again for this target: qdeploy quantize."


@dataclass(frozen=True)
class Violation:
    """A rule of a contract that a graph breaks.

    Attributes:
        node: Name of the node; empty when it is the model as a whole.
        op_type: Its operator.
        what: What stands in the graph, and what the target takes.
        reason: Why the target's rule is so.
        cure: What to do.
    """

    node: str
    op_type: str
    what: str
    reason: str
    cure: str


def lint(graph: ir.Model, contract: QuantContract) -> tuple[Violation, ...]:
    """Every rule that a quantized graph breaks, in graph order; empty for one that keeps the contract.

    A weighted operator counts as quantized if its weight is stored as integers: one that merely reads what a quantized
    operator delivers may have been kept float on purpose. Other operators are held to the schemes of what they read.
    """
    import onnx_ir.passes.common as passes

    # Other tools leave out the types of what they insert, and conditions ask for them.
    graph = graph.clone()
    passes.ShapeInferencePass()(graph)
    if contract.strict:
        dequantize_behind_movers(graph)
    quantized = frozenset(
        str(value.name) for node in graph.graph for value in node.outputs if questions.stored_scheme(value) is not None
    )
    found = list(_opset_violations(graph, contract))
    for node in graph.graph.all_nodes():
        if contract.strict:
            found += _pair_violations(node, contract)
        if node.op_type in NOT_QDQ or node.op_type == "QuantizeLinear":
            found += _form_violations(node, contract)
        else:
            found += _node_violations(node, contract, quantized)
    return tuple(found)


def _opset_violations(graph: ir.Model, contract: QuantContract) -> Iterator[Violation]:
    lowest, highest = contract.opsets
    opset = graph.opset_imports.get("", 0)
    if not lowest <= opset <= highest:
        what = f"the model has opset {opset}; {contract.target} takes {lowest} to {highest}"
        yield Violation("", "", what, "Operators of other opsets mean other things.", _AGAIN)


def _pair_violations(node: ir.Node, contract: QuantContract) -> Iterator[Violation]:
    """QDQ pairs that a strict target does not take, wherever they stand."""
    reason = "It refuses such pairs while it parses them, or runs what stands behind them in float."
    for what in pair_problems(node, contract):
        yield Violation(str(node.name), node.op_type, what, reason, _AGAIN)


def _form_violations(node: ir.Node, contract: QuantContract) -> Iterator[Violation]:
    """What is quantized in another way than the target's."""
    own = OWN.get(contract.form, {})
    reason, problems = "The target chooses its integer kernels itself.", []
    if node.op_type in own:
        rule = next((r for r in contract.rules if r.op_type == own[node.op_type] and r.quantizes), None)
        if rule is not None:
            reason, problems = rule.reason, [*_integer_problems(node, rule, contract)]
    elif node.op_type in NOT_QDQ:
        problems = [f"not QDQ: it computes on integers itself; {contract.target} takes {TAKEN[contract.form]}"]
    elif contract.form in OWN:
        problems = [f"its range is fixed; {contract.target} takes {TAKEN[contract.form]}"]
    for what in problems:
        yield Violation(str(node.name), node.op_type, what, reason, _AGAIN)


def _integer_problems(node: ir.Node, rule: OpRule, contract: QuantContract) -> Iterator[str]:
    """Weights stored as other integers than the rule of the float operator asks for."""
    for index, wanted in rule.inputs.items():
        value = node.inputs[index]
        array = questions.constant(value)
        if wanted is None or value is None or array is None:
            continue
        if node.op_type == "MatMulNBits":
            found, asked = _in_bytes(node), f"int{wanted.integer.bits} in {wanted.granularity}"
        else:
            found, asked = array.dtype.name, str(replace(wanted.integer, bits=wanted.integer.stored_bits))
        if found != asked:
            yield f"input {index} ({value.name!r}) is stored as {found}; {contract.target} takes {wanted}"
        elif beyond := _beyond(array, wanted.integer):
            yield f"input {index} ({value.name!r}) {beyond}; {contract.target} takes {wanted}"


def _in_bytes(node: ir.Node) -> str:
    """What the bytes of a MatMulNBits hold; zero points, which it takes or leaves out, are of no concern."""
    blocks = PerBlock(node.attributes.get_int("block_size", 0), 0)
    return f"int{node.attributes.get_int('bits', 4)} in {blocks}"


def _node_violations(node: ir.Node, contract: QuantContract, quantized: frozenset[str]) -> Iterator[Violation]:
    if node.op_type == "DequantizeLinear":
        return
    stored = {index: questions.stored_scheme(value) for index, value in enumerate(node.inputs)}
    weighted = questions.weight_of(node) is not None
    if not any(stored.values()) or (weighted and stored[1] is None):
        return
    rule = matching_rule(contract, node, quantized)
    if rule is None or not rule.quantizes:
        problems = [f"it runs in float, but its weight is stored as {stored[1]}"] if weighted else []
    else:
        problems = [*_input_problems(node, rule, stored, contract)]
        if weighted:
            problems += [*_bias_problems(node, contract), *_output_problems(node, rule, contract)]
    reason = (rule.reason if rule else "") or f"{contract.target} has no rule that quantizes this {node.op_type}."
    cure = (rule.cure if rule else "") or _AGAIN
    for what in problems:
        yield Violation(str(node.name), node.op_type, what, reason, cure)


def _input_problems(
    node: ir.Node, rule: OpRule, stored: dict[int, Scheme | None], contract: QuantContract
) -> Iterator[str]:
    for index, wanted in rule.inputs.items():
        value = node.inputs[index] if index < len(node.inputs) else None
        if wanted is None or value is None:
            continue
        found = stored[index]
        rank = len(value.shape) if value.shape is not None else 0
        if found is None and questions.weight_of(node) is None:
            continue
        if found is None or not _satisfies(found, wanted, rank):
            is_stored = f"is stored as {found}" if found is not None else "is float"
            yield f"input {index} ({value.name!r}) {is_stored}; {contract.target} takes {wanted}"
        elif beyond := _beyond(questions.stored_constant(value), wanted.integer):
            yield f"input {index} ({value.name!r}) {beyond}; {contract.target} takes {wanted}"


def _satisfies(found: Scheme, wanted: Scheme, rank: int) -> bool:
    """Whether a stored scheme is what a rule asks for; a symmetric grid or one scale in all is no less than asked."""
    integer = (found.integer.bits, found.integer.signed) == (wanted.integer.stored_bits, wanted.integer.signed)
    symmetry = found.symmetric or not wanted.symmetric
    return integer and symmetry and _within(found.granularity, wanted.granularity, rank)


def _beyond(integers: NDArray[Any] | None, wanted: IntegerType) -> str:
    """How far stored integers reach where fewer bits are wanted than their type has; empty if they do not."""
    largest = 0 if integers is None else int(np.abs(integers.astype(np.int64)).max(initial=0))
    if wanted.bits == wanted.stored_bits or largest <= 1 << (wanted.bits - 1):
        return ""
    return f"holds integers up to {largest} in magnitude"


def _within(found: Granularity, wanted: Granularity, rank: int) -> bool:
    if isinstance(found, PerChannel) and isinstance(wanted, PerChannel) and rank:
        return found.axis % rank == wanted.axis % rank
    return isinstance(found, PerTensor) or found == wanted


def _bias_problems(node: ir.Node, contract: QuantContract) -> Iterator[str]:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or questions.stored_constant(bias) is None:
        return
    found = questions.stored_scheme(bias)
    name = str(found.integer) if found is not None else "float"
    if name != contract.bias:
        yield f"its bias ({bias.name!r}) is {name}; {contract.target} takes it as {contract.bias}"


def _output_problems(node: ir.Node, rule: OpRule, contract: QuantContract) -> Iterator[str]:
    result = questions.result_of(node)
    if rule.output is None or contract.placement == "inputs":
        return
    if not any(consumer.op_type == "QuantizeLinear" for consumer in result.consumers()):
        yield f"its output ({result.name!r}) is not quantized; {contract.target} takes {rule.output}"
