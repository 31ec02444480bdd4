"""A session that also gives the tensors that are to be counted, as they lie in memory.

Where vectors are wide, ONNX Runtime keeps the tensors around convolutions in blocks, [N, C / 16, H, W, 16], and turns
those round that somebody asks for, which costs half as much as the network itself. Counting need not have them turned:

    Conv ──┬── Conv …                            Conv ──┬── Conv …
           └── ReorderOutput ── a, observed  →          └── a in blocks, observed
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qdeploy.errors import InputError
from qdeploy.model import FloatModel, model_files, size_of_files
from qdeploy.session import open_session

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime

LARGEST = 500_000_000
"""Bytes of a model that is worth writing out once more, so that ONNX Runtime shows what it has made of it."""


@dataclass(frozen=True)
class Observed:
    """What one output of the session is.

    Attributes:
        name: The model's tensor.
        block: Channels that lie side by side in memory; 1 where memory is as the shape says.
    """

    name: str
    block: int = 1


def open_observed(
    model: FloatModel, graph: ir.Model, axes: Mapping[str, int | None]
) -> tuple[onnxruntime.InferenceSession, tuple[Observed, ...]]:
    """A session of one thread, and what its outputs are.

    Args:
        model: Prepared.
        graph: As it was read from the model's file.
        axes: The channel axis of each tensor to observe; None for those that count as one channel.
    """
    present = {spec.name for spec in (*model.inputs, *model.outputs)}
    opened = partial(open_session, model.path, threads=1, observed=[name for name in axes if name not in present])
    if size_of_files(model_files(model.path)) > LARGEST or all(node.op_type != "Conv" for node in graph.graph):
        return _as_shaped(opened())
    try:
        with tempfile.TemporaryDirectory(prefix="qdeploy-") as folder:
            path = Path(folder) / "optimized.onnx"
            session = opened(optimized=path, weights="weights.bin")
            if observed := _take_blocks(path, axes):
                return open_session(path, threads=1, graph_level="disable"), observed
            return _as_shaped(session)
    except (OSError, InputError):  # no room to write; or what is wrong with the model is told below
        return _as_shaped(opened())


def _as_shaped(
    session: onnxruntime.InferenceSession,
) -> tuple[onnxruntime.InferenceSession, tuple[Observed, ...]]:
    return session, tuple(Observed(output.name) for output in session.get_outputs())


def _take_blocks(path: Path, axes: Mapping[str, int | None]) -> tuple[Observed, ...]:
    """Leave the blocks of an optimized model's outputs as they are, in its file; () where none are turned round.

    Blocks that are not full hold further zeros, which must not be counted: these are turned round as before.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph, block = model.graph, block_of_channels()
    outputs = {output.name: output for output in graph.output}
    uses = Counter(name for node in graph.node for name in node.input)
    taken: dict[str, Observed] = {}
    for node in [node for node in graph.node if node.op_type == "ReorderOutput"]:
        settings = {each.name: each.i for each in node.attribute}
        (blocks,), (name,) = node.input, node.output
        full = block > 1 and settings["channels"] % block == 0 and not settings.get("channels_last")
        if full and name in outputs and not uses[name] and blocks not in taken and axes.get(name) in (None, 1):
            graph.node.remove(node)
            outputs[name].name = blocks
            taken[blocks] = Observed(name, block)
    if taken:
        path.write_bytes(model.SerializeToString())
    return tuple(taken.get(output.name, Observed(output.name)) for output in graph.output) if taken else ()


@cache
def block_of_channels() -> int:
    """How many channels ONNX Runtime keeps side by side on this processor; 1 if it is not [N, C / block, H, W, block].

    It is seen from what becomes of 0, 1, 2, … when they are turned round.
    """
    import onnx
    from onnx import TensorProto, helper

    channels, domain = 64, "com.microsoft.nchwc"
    shape = (1, channels, 2, 3)
    node = helper.make_node("ReorderOutput", ["x"], ["y"], domain=domain, channels=channels)
    tensors = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name in ("x", "y")]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)]
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as folder:
        path = Path(folder) / "turn.onnx"
        onnx.save(helper.make_model(helper.make_graph([node], "turn", *tensors), opset_imports=imports), path)
        session = open_session(path, threads=1)
    counted = np.arange(math.prod(shape), dtype=np.float32)
    (turned,) = session.run(None, {"x": counted.reshape(shape)})
    for block in (4, 8, 16, 32):
        if np.array_equal(turned, np.moveaxis(counted.reshape(1, channels // block, 2, 3, block), 4, 2).reshape(shape)):
            return block
    return 1
