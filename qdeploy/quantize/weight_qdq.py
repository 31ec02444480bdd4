"""FloatModel → QuantizedModel with its weights as integers behind DequantizeLinear; everything else stays float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.errors import InputError
from qdeploy.model import FloatModel, QuantizedModel
from qdeploy.plan import quantizable
from qdeploy.quantize.integers import IntegerWeights, plain
from qdeploy.quantize.rewrite import tidy
from qdeploy.quantize.write import write
from qdeploy.scheme import OpRule, PerBlock, PerChannel, QuantContract, Scheme

if TYPE_CHECKING:
    import onnx_ir as ir

BLOCKS_OPSET = 21
"""The first operator set whose DequantizeLinear takes blocks and int4."""


def quantize_weight_qdq(
    model: FloatModel,
    contract: QuantContract,
    directory: Path,
    keep: Sequence[str] = (),
    replaced: Mapping[str, NDArray[np.float32]] = MappingProxyType({}),
) -> QuantizedModel:
    """Write a model with integer weights and float activations to `directory/model.onnx`, and check it.

    W ─► MatMul        becomes        Wq, scale, zero_point ─► DequantizeLinear ─► MatMul

    Args:
        model: A prepared model.
        contract: The target's rules: which operators, and the schemes of their weights, per channel or in blocks.
        directory: Where to write.
        keep: Nodes that stay float: "first", "last", or patterns of node or weight names (`*` and `?`).
        replaced: Weights that a recovery step has rounded, by name.

    Raises:
        InputError: A keep pattern matches nothing, or the operator set cannot be raised to one that has blocks.
    """
    graph = questions.load_graph(model.path)
    schemes = [scheme for rule in contract.rules for scheme in rule.inputs.values() if scheme is not None]
    if any(isinstance(scheme.granularity, PerBlock) or scheme.integer.bits < 8 for scheme in schemes):
        graph = _with_blocks(graph, model.name)
    chosen = quantizable(graph, contract, keep)
    weights = IntegerWeights(replaced)
    for node, rule in chosen:
        for index in rule.inputs:
            _dequantize(node, index, rule, weights)
    tidy(graph)
    return write(graph, model, contract, [str(node.name) for node, _ in chosen], directory)


def _with_blocks(graph: ir.Model, name: str) -> ir.Model:
    if graph.opset_imports.get("", 0) >= BLOCKS_OPSET:
        return graph
    import onnx_ir as ir
    from onnx import version_converter

    try:
        whole = ir.to_proto(ir.external_data.load_to_model(graph))
        return ir.from_proto(version_converter.convert_version(whole, BLOCKS_OPSET))
    except (RuntimeError, ValueError) as error:
        what = f"ONNX cannot convert {name} to opset {BLOCKS_OPSET}, which weights in blocks need: {error}"
        raise InputError(what, f"Export it with opset {BLOCKS_OPSET}.") from error


def _dequantize(node: ir.Node, index: int, rule: OpRule, weights: IntegerWeights) -> None:
    """Let a node read a weight through a DequantizeLinear, one for all nodes that read the same integers."""
    import onnx_ir as ir

    weight, scheme = node.inputs[index], rule.inputs[index]
    assert weight is not None
    assert scheme is not None
    stored, scale, zero_point = weights.of(node, index, rule, plain)
    readers = [reader for reader in stored.consumers() if reader.op_type == "DequantizeLinear"]
    if not readers:
        attributes = _attributes(scheme, len(weight.shape or ()))
        name = f"{stored.name}/dequantized"
        dequantize = ir.node("DequantizeLinear", [stored, scale, zero_point], attributes, name=name)
        result = dequantize.outputs[0]
        result.name, result.type, result.shape = name, weight.type, weight.shape
        assert stored.graph is not None
        stored.graph.insert_before(stored.graph[0], dequantize)
        readers = [dequantize]
    node.replace_input_with(index, readers[0].outputs[0])


def _attributes(scheme: Scheme, rank: int) -> dict[str, int]:
    match scheme.granularity:
        case PerChannel(axis):
            return {"axis": axis % rank}
        case PerBlock(size, axis):
            return {"axis": axis % rank, "block_size": size}
    return {}
