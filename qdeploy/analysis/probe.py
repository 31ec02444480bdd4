"""The float graph with branches: copies of parts of it that read rounded operands, run beside it.

                      ┌─► Conv ─► y ──────────┬─► Relu ─► …      the float graph, once
    x ────────────────┤                       ├─► Σ(ŷ − y)²
                      └─► round ─► Conv ─► ŷ ─┘                  a branch: the same Conv, its input rounded

A branch holds only what its rounding changes and reads all else from the float graph, so that one run on a sample
serves as many branches as there are. Rounding is written out as Div, Round, Clip and Mul, which is QuantizeLinear and
DequantizeLinear without the integers between: no optimizer makes an integer kernel of it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.affine import Affine
from qdeploy.analysis.operands import Storage
from qdeploy.backend import input_arrays
from qdeploy.errors import InputError
from qdeploy.parity.compare import SampleLike
from qdeploy.session import open_session

if TYPE_CHECKING:
    import onnx_ir as ir

MOST_WORKERS = 8
"""Each sample in flight holds the values of all branches in memory."""

Found = dict[str, NDArray[Any]]
"""What was watched in one run, by the name it was given."""


@dataclass(frozen=True)
class Branch:
    """Which operands are rounded, and how far that is followed.

    Attributes:
        name: Its own among the branches of a probe.
        storage: What becomes of operands.
        weights: Nodes that read their constants as stored.
        inputs: Nodes that read their activations as stored.
        covers: Nodes that are run again where their inputs change; None for all.
    """

    name: str
    storage: Storage
    weights: AbstractSet[str]
    inputs: AbstractSet[str]
    covers: AbstractSet[str] | None = None


class Probe:
    """A graph in the making: branches are grown and values watched, then it is written and run.

    Args:
        path: A prepared float model.
    """

    def __init__(self, path: Path) -> None:
        self.graph = questions.load_graph(path)
        self._nodes = list(self.graph.graph)
        self._values = {v.name: v for node in self._nodes for v in node.outputs}
        self._values |= {v.name: v for v in (*self.graph.graph.inputs, *self.graph.graph.initializers.values())}
        self._outputs = tuple(self.graph.graph.outputs)
        self.graph.graph.outputs.clear()

    @property
    def output_names(self) -> list[str]:
        """The model's outputs, in order."""
        return [questions.name_of(value) for value in self._outputs]

    def float_value(self, name: str) -> ir.Value:
        """A tensor of the float graph."""
        return self._values[name]

    def grow(self, branch: Branch) -> _Grown:
        """Add a branch."""
        grown = _Grown(self, branch)
        for node in self._nodes:
            if branch.covers is None or node.name in branch.covers:
                grown.follow(node)
        return grown

    def add(self, op_type: str, inputs: list[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        """Add a node with one output, which is named like it."""
        import onnx_ir as ir

        node = ir.node(op_type, inputs, attributes, name=name)
        node.outputs[0].name = name
        self.graph.graph.append(node)
        return node.outputs[0]

    def constant(self, array: NDArray[Any], name: str) -> ir.Value:
        """Add a constant; one that is there under the name already is that one."""
        import onnx_ir as ir

        known = self.graph.graph.initializers
        if name not in known:
            known.add(ir.val(name, const_value=ir.tensor(array, name=name)))
        return known[name]

    def watch(self, value: ir.Value, name: str) -> None:
        """Give a value as an output, under another name."""
        watched = self.add("Identity", [value], name)
        watched.type = value.type  # where it is not known, ONNX Runtime infers it
        self.graph.graph.outputs.append(watched)

    def watch_energy(self, value: ir.Value, name: str) -> None:
        """Give Σ value² as an output."""
        self.watch(self.add("ReduceSumSquare", [value], f"{name}/sum", keepdims=0), name)

    def watch_noise(self, value: ir.Value, reference: ir.Value, name: str) -> None:
        """Give Σ (value − reference)² as an output."""
        self.watch_energy(self.add("Sub", [value, reference], f"{name}/error"), name)

    def watch_shift(self, value: ir.Value, reference: ir.Value, axis: int, name: str) -> None:
        """Give Σ (value − reference) of each channel as an output, and below `<name>:size` how many values there are.

        Args:
            value: Of a branch.
            reference: The same tensor of the float graph, its rank known.
            axis: Of the channels.
            name: For the output.
        """
        assert reference.shape is not None
        rank = len(reference.shape)
        others = np.array([i for i in range(rank) if i != axis % rank], np.int64)
        error = self.add("Sub", [value, reference], f"{name}/error")
        total = self.add("ReduceSum", [error, self.constant(others, f"{name}/axes")], f"{name}/sum", keepdims=0)
        self.watch(total, name)
        self.watch(self.add("Size", [error], f"{name}/size"), f"{name}:size")

    def run(self, folder: Path, samples: Iterable[SampleLike], threads: int = 0) -> Iterator[tuple[SampleLike, Found]]:
        """Write the graph and run it: each sample with what was watched, in the samples' order.

        Samples run side by side, each on one thread; only a few are in flight at a time.

        Args:
            folder: Where to write the graph; what an earlier probe wrote there is replaced.
            samples: Read once.
            threads: Most samples side by side; 0 for one a core.

        Raises:
            InputError: There are no samples, or the model fails on one.
        """
        path = folder / "probe.onnx"
        questions.save_graph(self.graph, path)
        session = open_session(path, threads=1)
        names = [output.name for output in session.get_outputs()]

        def run(sample: SampleLike) -> Found:
            try:
                outputs = session.run(names, input_arrays(sample.inputs))
            except Exception as error:  # ORT raises a different class for each of its status codes
                origin = getattr(sample, "origin", "a sample")
                raise InputError(f"The model fails on {origin}: {str(error).strip()}") from error
            return dict(zip(names, outputs, strict=True))

        workers = min(threads or os.cpu_count() or 1, MOST_WORKERS)
        pending: deque[tuple[SampleLike, Future[Found]]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            for sample in samples:
                pending.append((sample, pool.submit(run, sample)))
                if len(pending) > workers:
                    first, future = pending.popleft()
                    yield first, future.result()
            if not pending:
                raise InputError("There are no samples to run.", "Give --calibration DATA.")
            for last, future in pending:
                yield last, future.result()


class _Grown:
    """A branch of a probe: what its rounding has changed."""

    def __init__(self, probe: Probe, branch: Branch) -> None:
        self._probe = probe
        self._branch = branch
        self._changed: dict[ir.Value, ir.Value] = {}
        self._rounded: dict[ir.Value, ir.Value] = {}

    def value(self, name: str, *, stored: bool = False) -> ir.Value:
        """A tensor as the branch has it; `stored` rounds it, if it is an activation that is stored."""
        original = self._probe.float_value(name)
        return self._stored(original) if stored else self._changed.get(original, original)

    def follow(self, node: ir.Node) -> None:
        """Run a node again if anything that it reads has changed."""
        import onnx_ir as ir

        inputs = [self._operand(node, index) for index in range(len(node.inputs))]
        added = self._branch.storage.biases.get((str(node.name), len(inputs)))
        if added is not None and added[0] in self._branch.weights:  # a bias where there was none
            inputs.append(self._probe.constant(added[1], self._name(f"{node.name}/bias")))
        same = len(inputs) == len(node.inputs) and all(a is b for a, b in zip(inputs, node.inputs, strict=True))
        if same and not any(value in self._changed for value in _captured(node)):
            return
        name = self._name(str(node.name))
        copy = ir.Node(
            node.domain, node.op_type, inputs, self._attributes(node), name=name, num_outputs=len(node.outputs)
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type, new.shape = self._name(str(old.name)), old.type, old.shape
            self._changed[old] = new
        self._probe.graph.graph.append(copy)

    def _name(self, original: str) -> str:
        """What something of the float graph is called in this branch; exporters put no spaces into names."""
        return f"{original} @ {self._branch.name}"

    def _operand(self, node: ir.Node, index: int) -> ir.Value | None:
        value, storage = node.inputs[index], self._branch.storage
        bias = storage.biases.get((str(node.name), index))
        if bias is not None and bias[0] in self._branch.weights:
            return self._probe.constant(bias[1], self._name(f"{node.name}/bias"))
        if value is None:
            return None
        if value.name in storage.weights and node.name in self._branch.weights:
            return self._probe.constant(storage.weights[value.name], f"{value.name} @ stored")
        if value.name in storage.activations and node.name in self._branch.inputs:
            return self._stored(value)
        return self._changed.get(value, value)

    def _stored(self, original: ir.Value) -> ir.Value:
        """An activation as it comes back from storage, rounded once for all who read it.

        x ─► Div(scale) ─► Round ─► Clip(qmin − z, qmax − z) ─► Mul(scale) ─► x̂
        """
        value = self._changed.get(original, original)
        grids = self._branch.storage.activations
        if original.name not in grids:
            return value
        if value not in self._rounded:
            name = self._name(f"{original.name}/stored")
            affine = grids[original.name]
            self._rounded[value] = self._through_half(value, name) if affine is None else self._on(value, affine, name)
        return self._rounded[value]

    def _on(self, value: ir.Value, affine: Affine, name: str) -> ir.Value:
        probe, integer, zero_point = self._probe, affine.integer, int(affine.zero_point)
        scale = probe.constant(affine.scale.astype(np.float32), f"{name}/scale")
        low, high = (
            probe.constant(np.asarray(limit - zero_point, np.float32), f"{name}/{side}")
            for limit, side in ((integer.qmin, "low"), (integer.qmax, "high"))
        )
        steps = probe.add("Round", [probe.add("Div", [value, scale], f"{name}/steps")], f"{name}/whole")
        return probe.add("Mul", [probe.add("Clip", [steps, low, high], f"{name}/clipped"), scale], name)

    def _through_half(self, value: ir.Value, name: str) -> ir.Value:
        import onnx_ir as ir

        half = self._probe.add("Cast", [value], f"{name}/half", to=int(ir.DataType.FLOAT16))
        return self._probe.add("Cast", [half], name, to=int(ir.DataType.FLOAT))

    def _attributes(self, node: ir.Node) -> Iterator[ir.Attr]:
        """A node's attributes; subgraphs are copied, and read what the branch has changed."""
        import onnx_ir as ir

        for attribute in node.attributes.values():
            if attribute.type != ir.AttributeType.GRAPH:
                yield attribute
                continue
            copy = attribute.value.clone(allow_outer_scope_values=True)
            for inner in copy.all_nodes():
                for index, value in enumerate(inner.inputs):
                    if value in self._changed:
                        inner.replace_input_with(index, self._changed[value])
            yield ir.AttrGraph(attribute.name, copy)


def _captured(node: ir.Node) -> Iterator[ir.Value]:
    """What a node's subgraphs read, from within and from without."""
    import onnx_ir as ir

    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.value.all_nodes():
                yield from (value for value in inner.inputs if value is not None)
