"""FloatModel → QuantizedModel with integer weights; what the user sees stays float: activations, inputs, outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.model import FloatModel, QuantizedModel
from qdeploy.plan import quantizable
from qdeploy.quantize import integers
from qdeploy.quantize.integers import IntegerWeights
from qdeploy.quantize.rewrite import ORT_DOMAIN, part_of, replace_product, tidy
from qdeploy.quantize.tables import look_up
from qdeploy.quantize.write import write
from qdeploy.scheme import OpRule, PerBlock, QuantContract

if TYPE_CHECKING:
    import onnx_ir as ir

INTEGER_ACCURACY = 4
"""MatMulNBits rounds activations to 8 bits and multiplies integers at this level; below it, it makes floats of them."""


def quantize_weights(
    model: FloatModel,
    contract: QuantContract,
    directory: Path,
    keep: Sequence[str] = (),
    replaced: Mapping[str, NDArray[np.float32]] = MappingProxyType({}),
) -> QuantizedModel:
    """Write a model with integer weights and float activations to `directory/model.onnx`, and check it.

    x ─► MatMul(W) ─► y        becomes        x ─► MatMulNBits(blocks of Wq, scales, zero points) ─► y

    Why not DequantizeLinear in front of a MatMul, which ONNX Runtime turns into the same operator: it does not where a
    Relu or Clip and a further product follow (then it makes floats of the weight on every run), and it cannot load a
    subgraph whose weights lie outside.

    Args:
        model: A prepared model.
        contract: The target's rules: which operators, and the schemes of their weights.
        directory: Where to write.
        keep: Nodes that stay float: "first", "last", or patterns of node or weight names (`*` and `?`).
        replaced: Weights that a recovery step has rounded, by name.

    Raises:
        InputError: A keep pattern matches nothing.
    """
    graph = questions.load_graph(model.path)
    chosen = quantizable(graph, contract, keep)
    weights = IntegerWeights(replaced)
    for node, rule in chosen:
        (look_up if node.op_type == "Gather" else _multiply_by_integers)(node, rule, weights)
    tidy(graph)
    return write(graph, model, contract, [str(node.name) for node, _ in chosen], directory)


def _multiply_by_integers(node: ir.Node, rule: OpRule, weights: IntegerWeights) -> None:
    scheme, weight = rule.inputs[1], questions.weight_of(node)
    assert weight is not None
    assert scheme is not None
    assert isinstance(scheme.granularity, PerBlock)
    transposed = bool(node.attributes.get_int("transB", 0))
    stored, scale, zero_point = weights.of(node, 1, rule, integers.transposed_blocks if transposed else integers.blocks)
    attributes = {
        "K": weight.shape[int(transposed)],
        "N": weight.shape[int(not transposed)],
        "bits": scheme.integer.bits,
        "block_size": scheme.granularity.size,
        "accuracy_level": INTEGER_ACCURACY,
    }
    offset = [] if scheme.symmetric else [zero_point]
    product = part_of(node, "MatMulNBits", [node.inputs[0], stored, scale, *offset], "product", attributes)
    product.domain, product.name = ORT_DOMAIN, node.name
    replace_product(node, [product])
