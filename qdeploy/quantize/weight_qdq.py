"""FloatModel → QuantizedModel with its weights as integers behind DequantizeLinear; everything else stays float."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.affine import affine_from_tensor, quantize
from qdeploy.errors import InputError
from qdeploy.model import FloatModel, QuantizedModel
from qdeploy.plan import quantizable
from qdeploy.quantize.integers import Integers, IntegerWeights, plain
from qdeploy.quantize.rewrite import tidy
from qdeploy.quantize.write import write
from qdeploy.scheme import OpRule, PerBlock, PerChannel, QuantContract, Scheme

if TYPE_CHECKING:
    import onnx_ir as ir

BLOCKS_OPSET = 21
"""The first operator set whose DequantizeLinear takes blocks and int4."""


def quantize_weight_qdq(
    model: FloatModel, contract: QuantContract, directory: Path, keep: Sequence[str] = ()
) -> QuantizedModel:
    """Write a model with integer weights and float activations to `directory/model.onnx`, and check it.

    W ─► MatMul        becomes        Wq, scale, zero_point ─► DequantizeLinear ─► MatMul

    Args:
        model: A prepared model.
        contract: The target's rules: which operators, and the schemes of their weights, per channel or in blocks.
        directory: Where to write.
        keep: Nodes that stay float: "first", "last", or patterns of node or weight names (`*` and `?`).

    Raises:
        InputError: A keep pattern matches nothing, or the operator set cannot be raised to one that has blocks.
    """
    graph = questions.load_graph(model.path)
    schemes = [scheme for rule in contract.rules for scheme in rule.inputs.values() if scheme is not None]
    if any(isinstance(scheme.granularity, PerBlock) or scheme.integer.bits < 8 for scheme in schemes):
        graph = _with_blocks(graph, model.name)
    chosen = quantizable(graph, contract, keep)
    weights = IntegerWeights()
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
    stored, scale, zero_point = weights.of(node, index, rule, rounded)
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


def rounded(weight: NDArray[np.float32], scheme: Scheme) -> Integers:
    """A weight in its own layout, as DequantizeLinear reads it: a scale a tensor, a channel, or a block."""
    stored, scale, zero_point = (blocked if isinstance(scheme.granularity, PerBlock) else plain)(weight, scheme)
    return _packed(stored, scheme), scale, _packed(zero_point, scheme)


def blocked(weight: NDArray[np.float32], scheme: Scheme) -> Integers:
    """Scales and zero points have the shape of the weight, with one value for each block along its axis.

    The last block may be short (ONNX, DequantizeLinear, block_size).
    """
    assert isinstance(scheme.granularity, PerBlock)
    size, axis = scheme.granularity.size, scheme.granularity.axis
    last = np.moveaxis(weight, axis, -1)
    length = last.shape[-1]
    filled = np.pad(last, [(0, 0)] * (last.ndim - 1) + [(0, -length % size)])
    rows = filled.reshape(-1, size)
    affine = affine_from_tensor(rows, scheme.integer, symmetric=scheme.symmetric, axis=0)
    stored = quantize(rows, affine).reshape(filled.shape)[..., :length]
    scale, zero_point = (each.reshape(*last.shape[:-1], -1) for each in (affine.scale, affine.zero_point))
    return np.moveaxis(stored, -1, axis), np.moveaxis(scale, -1, axis), np.moveaxis(zero_point, -1, axis)


def _packed(integers: NDArray[Any], scheme: Scheme) -> NDArray[Any]:
    """4-bit integers in the type that ONNX packs two to a byte."""
    if scheme.integer.bits != 4:
        return integers
    import ml_dtypes

    return integers.astype(ml_dtypes.int4 if scheme.integer.signed else ml_dtypes.uint4)
