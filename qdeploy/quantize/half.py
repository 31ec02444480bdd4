"""FloatModel → QuantizedModel in float16, with the float32 inputs and outputs of the float model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qdeploy import graph as questions
from qdeploy.errors import UnavailableError
from qdeploy.model import FloatModel, QuantizedModel
from qdeploy.plan import kept_nodes
from qdeploy.quantize.rewrite import tidy
from qdeploy.quantize.write import write
from qdeploy.scheme import QuantContract


def to_half(model: FloatModel, contract: QuantContract, directory: Path, keep: Sequence[str] = ()) -> QuantizedModel:
    """Write a float16 model to `directory/model.onnx`, and check it.

    Constants beyond ±65504, such as masks of -3e38, become ±65504: as infinities they would turn sums into NaN.

    Args:
        model: A prepared model.
        contract: The target's rules.
        directory: Where to write.
        keep: Nodes that stay float32: "first", "last", or patterns of node or weight names (`*` and `?`).

    Raises:
        InputError: A keep pattern matches nothing.
        UnavailableError: onnxruntime is not installed.
    """
    import onnx_ir as ir

    try:
        from onnxruntime.transformers.float16 import convert_float_to_float16
    except ModuleNotFoundError as error:
        raise UnavailableError("onnxruntime is not installed.", "Install it: pip install 'qdeploy[cpu]'") from error
    graph = questions.load_graph(model.path)
    kept = list(kept_nodes(graph, keep))
    whole = ir.to_proto(ir.external_data.load_to_model(graph))
    half = convert_float_to_float16(whole, keep_io_types=True, disable_shape_infer=True, node_block_list=kept)
    graph = ir.from_proto(half)
    tidy(graph)
    graph.graph.sort()
    return write(graph, model, contract, (), directory)
