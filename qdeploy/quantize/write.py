"""The last step of every way to quantize: check the graph, save it, and say what it is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from qdeploy.graph import save_graph
from qdeploy.model import FloatModel, QuantizedModel, digest_of_files, model_files
from qdeploy.quantize.check import check_written
from qdeploy.scheme import QuantContract

if TYPE_CHECKING:
    import onnx_ir as ir


def write(
    graph: ir.Model, model: FloatModel, contract: QuantContract, quantized_nodes: Iterable[str], directory: Path
) -> QuantizedModel:
    """Save a graph that was made from a float model to `directory/model.onnx`.

    Raises:
        InternalError: It is no valid ONNX, or its inputs or outputs are not the float model's.
    """
    check_written(graph, model)
    path = directory / "model.onnx"
    save_graph(graph, path)
    return QuantizedModel(path, digest_of_files(model_files(path)), model, contract, frozenset(quantized_nodes))
