"""Rows of a constant table that is stored as integers: only those that are looked up become floats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qdeploy.quantize import integers
from qdeploy.quantize.integers import IntegerWeights
from qdeploy.quantize.rewrite import ORT_DOMAIN, part_of, replace
from qdeploy.scheme import OpRule, PerBlock

if TYPE_CHECKING:
    import onnx_ir as ir


def look_up(node: ir.Node, rule: OpRule, weights: IntegerWeights) -> None:
    """Put a lookup of integers in the place of a Gather of rows."""
    scheme = rule.inputs[0]
    assert scheme is not None
    chain = _in_blocks if isinstance(scheme.granularity, PerBlock) else _in_rows
    replace(node, chain(node, rule, weights))


def _in_rows(node: ir.Node, rule: OpRule, weights: IntegerWeights) -> list[ir.Node]:
    """Operators of ONNX's own, for one scale a row.

    i ─► Gather(W) ─► y        becomes        i ─► Gather(Wq) ─► Cast ─► Mul ─► y
                                              └──► Gather(scales) ───────┘
    """
    import onnx_ir as ir

    stored, scale, _ = weights.of(node, 0, rule, integers.rows)
    indices = node.inputs[1]
    found = part_of(node, "Gather", [stored, indices], "integers")
    found.name = node.name
    cast = part_of(node, "Cast", found.outputs, "cast", {"to": ir.DataType.FLOAT})
    scales = part_of(node, "Gather", [scale, indices], "scales")
    return [found, cast, scales, part_of(node, "Mul", [cast.outputs[0], scales.outputs[0]], "scaled")]


def _in_blocks(node: ir.Node, rule: OpRule, weights: IntegerWeights) -> list[ir.Node]:
    """An operator of ONNX Runtime's, for blocks of each row.

    i ─► Gather(W) ─► y        becomes        i ─► GatherBlockQuantized(Wq, scales, zero points) ─► y
    """
    scheme = rule.inputs[0]
    assert scheme is not None
    assert isinstance(scheme.granularity, PerBlock)
    stored, scale, zero_point = weights.of(node, 0, rule, integers.plain)
    attributes = {"block_size": scheme.granularity.size, "gather_axis": 0, "quantize_axis": 1}
    inputs = [stored, node.inputs[1], scale, zero_point]
    found = part_of(node, "GatherBlockQuantized", inputs, "blocks", attributes)
    found.domain, found.name = ORT_DOMAIN, node.name
    return [found]
