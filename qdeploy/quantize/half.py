"""FloatModel → QuantizedModel with its weights in float16, each behind a Cast to what it was.

A runtime without float16 operators folds the casts when it loads the model, and is as fast and nearly as exact as with
the float model, of which the file is half as large. Activations stay float32, so that none can overflow. ONNX Runtime's
converter, which makes them float16 too, was slower on its CPU provider (0.92 times FP32's speed on MiniLM), where
nearly every operator computes in float32 between casts, and ONNX Runtime 1.32 crashed on what it made of an LSTM tagger
(a Transpose before a MatMul).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qdeploy import graph as questions
from qdeploy.model import FloatModel, QuantizedModel
from qdeploy.plan import kept_nodes
from qdeploy.quantize.rewrite import tidy
from qdeploy.quantize.write import write
from qdeploy.scheme import QuantContract

if TYPE_CHECKING:
    import onnx_ir as ir

LARGEST = float(np.finfo(np.float16).max)
"""65504: masks of -3e38 and the like stay float32."""


def to_half(model: FloatModel, contract: QuantContract, directory: Path, keep: Sequence[str] = ()) -> QuantizedModel:
    """Write a model whose weights are float16 to `directory/model.onnx`, and check it.

    W ─► MatMul        becomes        W16 ─► Cast ─► MatMul

    Weights are the constants of two and more dimensions; biases and factors are small, and stay what they are.

    Args:
        model: A prepared model.
        contract: The target's rules.
        directory: Where to write.
        keep: Nodes whose weights stay float32: "first", "last", or patterns of node or weight names (`*` and `?`).

    Raises:
        InputError: A keep pattern matches nothing.
    """
    graph = questions.load_graph(model.path)
    kept = kept_nodes(graph, keep)
    for each in graph.graphs():
        for value in list(each.initializers.values()):
            if not any(str(reader.name) in kept for reader in value.consumers()):
                _store_half(each, value)
    tidy(graph)
    return write(graph, model, contract, (), directory)


def _store_half(graph: ir.Graph, weight: ir.Value) -> None:
    import onnx_ir as ir

    array = questions.constant(weight)
    if array is None or array.dtype != np.float32 or array.ndim < 2 or weight.is_graph_output():
        return
    if array.size == 0 or np.abs(array).max() > LARGEST:
        return
    name = f"{weight.name}/half"
    half = ir.val(name, const_value=ir.tensor(array.astype(np.float16), name=name))
    cast = ir.node("Cast", [half], {"to": ir.DataType.FLOAT}, name=f"{weight.name}/cast")
    restored = cast.outputs[0]
    restored.name, restored.type, restored.shape = cast.name, weight.type, weight.shape
    graph.register_initializer(half)
    graph.insert_before(graph[0], cast)
    weight.replace_all_uses_with(restored)
