"""Samples on their way through the quantized network, for steps that look at one layer after another.

A layer deep in the network sees what the rounding before it has left of its input. What a step does to a layer changes
only what comes behind it, so each stretch of the network is run once: between two layers, the tensors that are still
to be read wait on disk, as integers where they are on a grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qdeploy import graph as questions
from qdeploy.recover.layer_data import Found, Tap
from qdeploy.samples.source import Sample

if TYPE_CHECKING:
    import onnx_ir as ir


class Flow:
    """The samples, each as far in the network as it has been run.

    Args:
        samples: Read once.
        folder: Where their tensors are kept, one file a sample.
    """

    def __init__(self, samples: Iterable[Sample], folder: Path) -> None:
        self._folder = folder
        self._names: list[str] = []
        self._origins: list[str] = []
        for index, sample in enumerate(samples):
            self._names = list(sample.inputs)
            self._origins.append(sample.origin)
            self._keep(index, sample.inputs)

    def run(self, simulation: ir.Model, node: str, wanted: str) -> Iterator[Found]:
        """Bring every sample up to a node, and give for each the tensors there and one more. To be read to its end.

        Args:
            simulation: As `simulate` makes it; the same nodes at each call, and the same constants up to where the
                samples are.
            node: The name of one of its nodes, not before the last one.
            wanted: The name of one of its tensors, which may lie behind the node.
        """
        waiting = [questions.name_of(value) for value in _waiting(simulation.graph, node)]
        first = self._kept(0)
        _cut(simulation.graph, first)
        tap = Tap(simulation, [*waiting, wanted], self._folder / "stretch.onnx")
        before, self._names = self._names, waiting
        for index, origin in enumerate(self._origins):
            found = tap(Sample(self._kept(index, before), origin=origin))
            self._keep(index, found)
            yield found

    def _path(self, index: int) -> Path:
        return self._folder / f"sample-{index}.npz"

    def _keep(self, index: int, found: Found) -> None:
        np.savez(self._path(index), *(found[name] for name in self._names))

    def _kept(self, index: int, names: list[str] | None = None) -> Found:
        with np.load(self._path(index)) as arrays:
            return {name: arrays[f"arr_{place}"] for place, name in enumerate(names or self._names)}


def _waiting(graph: ir.Graph, name: str) -> list[ir.Value]:
    """What is there before a node and read by it or after it; on a grid, the integers."""
    import onnx_ir as ir

    done: dict[ir.Node, None] = {}
    for node in graph:
        if node.name == name:
            break
        # What is no tensor cannot be kept, and is computed again each time.
        if node.op_type != "DequantizeLinear" and all(isinstance(v.type, ir.TensorType) for v in node.outputs):
            done[node] = None
    there = (*graph.inputs, *(value for node in done for value in node.outputs))
    return [value for value in there if not done.keys() >= set(_readers(value))]


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that read a tensor; of integers on a grid, those that read what they stand for."""
    for node in value.consumers():
        if node.op_type == "DequantizeLinear":
            yield from node.outputs[0].consumers()
        else:
            yield node


def _cut(graph: ir.Graph, found: Found) -> None:
    """Let a graph begin with tensors from inside of it.

    x ─► Conv ─► y ─► Relu        becomes        y ─► Relu
    """
    import onnx_ir as ir

    values = {value.name: value for value in (*graph.inputs, *(v for node in graph for v in node.outputs))}
    inputs = []
    for name, array in found.items():
        value = values[name]
        kind = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        begin = ir.Value(name=name, type=kind, shape=value.shape)
        value.replace_all_uses_with(begin, replace_graph_outputs=True)
        value.name = f"{name}/before"
        inputs.append(begin)
    graph.inputs[:] = inputs
