"""The model that an engine was built from, run by ONNX Runtime on the CPU: what stands in where there is no GPU."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qdeploy.backend import Evidence
from qdeploy.graph import load_graph, save_graph
from qdeploy.session import SessionRunner, open_session

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime

ROUNDED_BY_NATURE = frozenset({"Cast", "Constant", "ConstantOfShape"})


class Simulated(SessionRunner):
    """A QDQ graph as it is written. float16 tensors are rounded to float16 wherever one is written.

    ONNX Runtime has few float16 operators for the CPU: it computes in float32 and, on its own, rounds at the end of the
    network only, so that neither overflow nor lost bits would show.
    """

    evidence = Evidence.SIMULATED

    def __init__(self, path: Path) -> None:
        super().__init__(path, opener=partial(_open_rounded, path))


def _open_rounded(path: Path) -> onnxruntime.InferenceSession:
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as folder:
        graph = load_graph(path)
        if round_to_float16(graph):
            path = Path(folder) / path.name
            save_graph(graph, path)
        return open_session(path, graph_level="disable")


def round_to_float16(graph: ir.Model) -> bool:
    """Let a float16 graph compute in float32, and round what every operator writes; whether there was anything to do.

    Conv(x16, W16) ─► y16        becomes        Conv(x, W) ─► y ─► Cast to float16 ─► Cast to float32
    """
    import onnx_ir as ir
    import onnx_ir.passes.common as passes

    constants = [v for g in graph.graphs() for v in g.initializers.values() if v.dtype == ir.DataType.FLOAT16]
    if not constants and not any(v.dtype == ir.DataType.FLOAT16 for n in graph.graph.all_nodes() for v in n.outputs):
        return False
    passes.ShapeInferencePass()(graph)
    for value in constants:
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy().astype("float32"), name=value.name)
        value.dtype = ir.DataType.FLOAT
    for node in list(graph.graph.all_nodes()):
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT16:
                _round(node, value)
    return True


def _round(node: ir.Node, value: ir.Value) -> None:
    import onnx_ir as ir

    half, single = ir.DataType.FLOAT16, ir.DataType.FLOAT
    chain = [] if node.op_type in ROUNDED_BY_NATURE else [half]
    value.dtype = single if chain else half
    readers, is_output, last, behind = list(value.uses()), value.is_graph_output(), value, node
    for kind in (*chain, single):
        cast = ir.node("Cast", [last], {"to": kind}, name=f"{value.name}/{kind.name}")
        cast.outputs[0].name, cast.outputs[0].type = cast.name, ir.TensorType(kind)
        assert node.graph is not None
        node.graph.insert_after(behind, cast)
        last, behind = cast.outputs[0], cast
    for use in readers:
        use.node.replace_input_with(use.idx, last)
    if is_output and isinstance(node.graph, ir.Graph):
        outputs = node.graph.outputs
        outputs[:] = [last if each is value else each for each in outputs]
