"""QDQ pairs that no rule describes: a strict target refuses them, or computes in float behind them without a word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qdeploy import graph as questions
from qdeploy.affine import IntegerType
from qdeploy.plan import matching_rule
from qdeploy.quantize.movers import is_mover
from qdeploy.scheme import PerChannel, QuantContract, Scheme

if TYPE_CHECKING:
    import onnx_ir as ir

PAIR = ("QuantizeLinear", "DequantizeLinear")


def pair_problems(node: ir.Node, contract: QuantContract) -> Iterator[str]:
    """What a strict target does not take of a node that quantizes, dequantizes, or stands behind one that does.

    A weight and what is multiplied with it are left to the rule of their operator, and so are biases.
    """
    if node.op_type == "QuantizeLinear":
        yield from _unclear_type(node, contract)
    elif node.op_type == "DequantizeLinear":
        yield from _odd_type(node, contract)
    elif node.op_type == "Cast" and _is_dequantized(node.inputs[0]):
        readers = _products_behind(node)
        if readers:
            where = f"between a DequantizeLinear and {', '.join(readers)}"
            yield f"it stands {where}; {contract.target} then computes in float without a word"
    elif is_mover(node) and _is_stored_constant(node.inputs[0]) and _products_behind(node):
        what = f"it cuts or joins the axis along which its constant {questions.name_of(node.inputs[0])!r} has scales"
        yield f"{what}; {contract.target} then computes {', '.join(_products_behind(node))} in float without a word"
    elif not questions.has_weight(node):
        rule = matching_rule(contract, node, frozenset())
        stored = [v for i, v in enumerate(node.inputs) if not (rule and rule.inputs.get(i))]
        constants = [v.name for v in stored if v is not None and _is_stored_constant(v)]
        if constants:
            yield f"it runs in float, but its constant {constants[0]!r} is stored as integers"


def _unclear_type(node: ir.Node, contract: QuantContract) -> Iterator[str]:
    has_type = len(node.inputs) > 2 and node.inputs[2] is not None
    if not has_type and not node.attributes.get_int("output_dtype", 0):
        what = "it has no zero point, so it means uint8 to ONNX and int8 to the target"
        yield f"{what}; {contract.target} takes {' or '.join(_integers(contract))} with a zero point of 0"
    x, scale = node.inputs[:2]
    if x is not None and scale is not None and None not in (x.dtype, scale.dtype) and x.dtype != scale.dtype:
        yield f"its scale is {scale.dtype.name}, and what it quantizes is {x.dtype.name}"


def _odd_type(node: ir.Node, contract: QuantContract) -> Iterator[str]:
    readers = list(node.outputs[0].uses())
    if readers and all(questions.weight_of(use.node) is not None and use.idx < 3 for use in readers):
        return
    found = questions.stored_scheme(node.outputs[0])
    if found is not None and not _is_taken(found, contract):
        integers = node.inputs[0]
        name = integers.name if integers is not None else ""
        yield f"{name!r} is stored as {found}; {contract.target} takes {' or '.join(_integers(contract))}"


def _is_taken(found: Scheme, contract: QuantContract) -> bool:
    return any(
        (found.integer.bits, found.integer.signed) == (wanted.integer.bits, wanted.integer.signed)
        and (found.symmetric or not wanted.symmetric)
        and (isinstance(wanted.granularity, PerChannel) or not isinstance(found.granularity, PerChannel))
        for wanted in _schemes(contract)
    )


def _schemes(contract: QuantContract) -> list[Scheme]:
    return [scheme for rule in contract.rules for scheme in (*rule.inputs.values(), rule.output) if scheme is not None]


def _integers(contract: QuantContract) -> list[str]:
    kinds: dict[tuple[IntegerType, bool], None] = {(s.integer, s.symmetric): None for s in _schemes(contract)}
    names = [f"{integer} {'symmetric' if symmetric else 'asymmetric'}" for integer, symmetric in kinds]
    return list(dict.fromkeys(names)) or ["no integers"]


def _products_behind(node: ir.Node) -> list[str]:
    """Names of the products that read a node's output, or read it behind Casts and operators that move values."""
    readers = list(node.outputs[0].consumers())
    hand_on = [reader for reader in readers if reader.op_type == "Cast" or is_mover(reader)]
    behind = [name for reader in hand_on for name in _products_behind(reader)]
    return [*(str(reader.name) for reader in readers if reader.op_type in questions.WEIGHTED), *behind]


def _is_dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _is_stored_constant(value: ir.Value | None) -> bool:
    return _is_dequantized(value) and questions.stored_constant(value) is not None
