"""AdaRound: round each weight up or down so that its layer's output changes least, not the weight itself.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization" (arXiv 2004.10568), with the
activation behind the layer in the loss, and asymmetric: a layer reads what the network quantized so far gives it, and
comes as close as it can to the float network's output, so that it takes back part of what the layers before it lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.errors import UnavailableError
from qdeploy.plan import QuantPlan
from qdeploy.recover.bias_correction import has_place_for_bias, present_bias
from qdeploy.recover.flow import Flow
from qdeploy.recover.layer_data import Tap, constant_weight, simulate, weighted_nodes
from qdeploy.recover.recovery import Recovery
from qdeploy.recover.rounding import Rows, choose, neighbours
from qdeploy.recover.rows import Positions, input_rows, is_product, matrices, output_rows, position_count, stored_layout
from qdeploy.samples.source import Sample

if TYPE_CHECKING:
    import onnx_ir as ir

NAME = "adaround"

ROWS = 4096
"""Output positions of a layer, over all samples, that its rounding is chosen by."""

LAYER_BYTES = 1 << 26
LEAST_ROWS = 256
"""A layer whose rows would take more memory than that gets fewer of them, but no fewer than these."""

FEWEST_ROWS = 64
"""Fewer rows of a layer that has more inputs than rows tell nothing of them."""


def adaround(recovery: Recovery) -> Recovery:
    """The recovery with the weights of Conv, Gemm and MatMul rounded up or down, layer after layer.

    A weight never moves by more than one step of its grid. Biases move along, and later corrections leave them alone.
    Rounded to nearest stay the weights of ConvTranspose, batched ones, those that several nodes read, and those of a
    layer that has too few output positions over all samples: fewer than inputs, and fewer than 64.

    It costs one pass over the samples through the float network, one through the quantized network, and an
    optimization for each layer; nothing at run time. Between layers, the tensors of all samples wait on disk.

    Raises:
        UnavailableError: torch is not installed.
        InputError: The samples are not at hand.
    """
    _require_torch()
    plan, samples = recovery.plan, recovery.require_samples(NAME)
    graph = questions.load_graph(plan.model.path)
    nodes = [node for node in weighted_nodes(plan, graph) if is_product(node) and _is_sole_reader(node)]
    with TemporaryDirectory(dir=recovery.require_means(NAME).folder) as name:
        targets = _Targets(plan, nodes, samples, recovery.statistics.samples, Path(name))
        flow = Flow(samples, Path(name))
        for node in nodes:
            plan = _rounded(plan, node, _collect(plan, node, flow, targets))
    return replace(recovery, plan=replace(plan, steps=(*plan.steps, NAME)))


def _require_torch() -> None:
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise UnavailableError("AdaRound needs torch.", "Install it: pip install 'qdeploy[torch]'")


def _is_sole_reader(node: ir.Node) -> bool:
    return len(node.inputs[1].uses()) == 1


class _Targets:
    """The float outputs that each layer is to come close to, at some of its output positions of each sample.

    Args:
        plan: Of the model.
        nodes: The layers.
        samples: Read once.
        number: How many samples there are.
        folder: Where the outputs wait, one file a sample.
    """

    def __init__(
        self, plan: QuantPlan, nodes: Sequence[ir.Node], samples: Iterable[Sample], number: int, folder: Path
    ) -> None:
        self._folder, self._number = folder, 0
        results = {str(node.name): questions.name_of(questions.result_of(node)) for node in nodes}
        exact = Tap(questions.load_graph(plan.model.path), results.values(), folder / "float.onnx", "all")
        random = np.random.default_rng(0)
        for sample in samples:
            found, arrays = exact(sample), []
            for node in nodes:
                y = found[results[str(node.name)]]
                count = position_count(node, y)
                chosen = random.choice(count, min(math.ceil(_row_limit(node) / number), count), replace=False)
                arrays += [np.array(y.shape), chosen, output_rows(node, y, chosen)]
            np.savez(self._path(self._number), *arrays)
            self._number += 1
        self._places = {name: 3 * place for place, name in enumerate(results)}

    def of(self, node: ir.Node) -> Iterator[tuple[tuple[int, ...], Positions, NDArray[np.float32]]]:
        """For each sample the shape of a layer's output, the positions chosen, and its rows there."""
        first = self._places[str(node.name)]
        for index in range(self._number):
            with np.load(self._path(index)) as arrays:
                shape, chosen, rows = (arrays[f"arr_{first + part}"] for part in range(3))
            yield tuple(shape.tolist()), chosen, rows

    def _path(self, index: int) -> Path:
        return self._folder / f"targets-{index}.npz"


def _collect(plan: QuantPlan, node: ir.Node, flow: Flow, targets: _Targets) -> Rows:
    """The rows of one layer, from all samples; in random order, so that each batch is of many of them."""
    simulation = simulate(plan)
    (source,) = (questions.name_of(each.inputs[0]) for each in simulation.graph if each.name == node.name)
    xs, ys = [], []
    reached = flow.run(simulation, str(node.name), source)
    for found, (shape, chosen, rows) in zip(reached, targets.of(node), strict=True):
        xs.append(input_rows(node, found[source], chosen, shape))
        ys.append(rows)
    x, y = np.concatenate(xs, axis=1), np.concatenate(ys, axis=1)
    order = np.random.default_rng(0).permutation(y.shape[1])
    has_place = has_place_for_bias(node, constant_weight(node))
    return Rows(x[:, order], y[:, order], _bias(plan, node, y), _bounds(node), has_place)


def _row_limit(node: ir.Node) -> int:
    groups, inputs, outputs = matrices(node, constant_weight(node)).shape
    return int(min(ROWS, max(LEAST_ROWS, LAYER_BYTES // (4 * groups * (inputs + outputs)))))


def _bias(plan: QuantPlan, node: ir.Node, y: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is added to each column of a layer's output, [groups, 1, outputs]; a MatMul's is added behind it."""
    groups, _, outputs = y.shape
    bias = np.zeros(groups * outputs) if node.op_type == "MatMul" else present_bias(plan, node, groups * outputs)
    return bias.reshape(groups, 1, outputs).astype(np.float32)


def _bounds(node: ir.Node) -> tuple[float, float]:
    activation = questions.fused_activation(node)
    return (-math.inf, math.inf) if activation is None else questions.activation_bounds(activation)


def _rounded(plan: QuantPlan, node: ir.Node, rows: Rows) -> QuantPlan:
    """The plan with one layer's weight rounded and its bias shifted; as it was, where the rows are too few to tell."""
    weight, name = constant_weight(node), questions.name_of(node.inputs[1])
    number, inputs = rows.x.shape[1:]
    if number < min(inputs, FEWEST_ROWS):
        return plan
    exact, *grid = (matrices(node, each) for each in (weight, *neighbours(weight, plan.weights[name])))
    found, shift = choose(rows.with_at_least(2 * inputs, exact), exact, *grid)
    plan = replace(plan, replaced={**plan.replaced, name: stored_layout(node, found, weight.shape)})
    if not rows.takes_shift:
        return plan
    bias = (present_bias(plan, node, shift.size) + shift.reshape(-1)).astype(np.float32)
    return replace(plan, biases={**plan.biases, str(node.name): bias})
