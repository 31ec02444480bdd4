"""AdaRound: round each weight up or down so that its layer's output changes least, not the weight itself.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization" (arXiv 2004.10568), with the
activation behind the layer in the loss, and asymmetric: a layer reads what the network quantized so far gives it, and
comes as close as it can to the float network's output, so that it takes back part of what the layers before it lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from qdeploy.recover.layer_data import Tap, blocks, constant_weight, simulate, weighted_nodes
from qdeploy.recover.recovery import Recovery
from qdeploy.recover.rounding import Rows, choose, neighbours
from qdeploy.recover.rows import input_rows, is_product, matrices, output_rows, position_count, stored_layout

if TYPE_CHECKING:
    import onnx_ir as ir

NAME = "adaround"

ROWS = 4096
"""Output positions of a layer, over all samples, that its rounding is chosen by."""

BLOCK_BYTES = 1 << 28
LEAST_ROWS = 256
"""A layer whose rows would take more than its part of that memory gets fewer of them, but no fewer than these."""


def adaround(recovery: Recovery) -> Recovery:
    """The recovery with the weights of Conv, Gemm and MatMul rounded up or down, layer after layer.

    A weight never moves by more than one step of its grid. Weights of ConvTranspose, batched ones and those that
    several nodes read stay rounded to nearest. Rounding is chosen for the biases as they are; they are corrected anew
    by a step that comes after.

    It costs at most 12 passes over the samples, through the float and the quantized network, and then one
    optimization a layer.

    Raises:
        UnavailableError: torch is not installed.
        InputError: The samples are not at hand.
    """
    _require_torch()
    graph = questions.load_graph(recovery.plan.model.path)
    nodes = [node for node in weighted_nodes(recovery.plan, graph) if is_product(node) and _is_sole_reader(node)]
    for start, block in blocks(nodes):
        collected = _collect(recovery, block, nodes[start:])
        for node, rows in zip(block, collected, strict=True):
            recovery = replace(recovery, plan=_rounded(recovery.plan, node, rows))
    return replace(recovery, plan=replace(recovery.plan, steps=(*recovery.plan.steps, NAME)))


def _require_torch() -> None:
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise UnavailableError("AdaRound needs torch.", "Install it: pip install 'qdeploy[torch]'")


def _is_sole_reader(node: ir.Node) -> bool:
    return len(node.inputs[1].uses()) == 1


def _collect(recovery: Recovery, block: Sequence[ir.Node], waiting: Sequence[ir.Node]) -> list[Rows]:
    """The rows of each layer of a block, from one pass over the samples.

    Args:
        recovery: Its plan holds the rounding of the blocks before.
        block: The layers.
        waiting: Those whose rounding is not chosen yet, this block's among them.
    """
    plan, samples = recovery.plan, recovery.require_samples(NAME)
    random = np.random.default_rng(0)
    parts: list[list[tuple[NDArray[np.float32], NDArray[np.float32]]]] = [[] for _ in block]
    with TemporaryDirectory(dir=recovery.require_means(NAME).folder) as name:
        path, simulation = Path(name), simulate(plan, waiting)
        twins = {each.name: each for each in simulation.graph}
        sources = [questions.name_of(twins[node.name].inputs[0]) for node in block]
        results = [questions.name_of(questions.result_of(node)) for node in block]
        exact = Tap(questions.load_graph(plan.model.path), results, path / "float.onnx", "all")
        quantized = Tap(simulation, sources, path / "quantized.onnx")
        for sample in samples:
            given, wanted = quantized(sample), exact(sample)
            for node, source, result, part in zip(block, sources, results, parts, strict=True):
                y = wanted[result]
                count = position_count(node, y)
                each = math.ceil(_row_limit(node, BLOCK_BYTES // len(block)) / recovery.statistics.samples)
                chosen = random.choice(count, min(each, count), replace=False)
                part.append((input_rows(node, given[source], chosen, y.shape), output_rows(node, y, chosen)))
    return [_joined(plan, node, part, random) for node, part in zip(block, parts, strict=True)]


def _row_limit(node: ir.Node, memory: int) -> int:
    """How many rows to choose a layer's rounding by, within so many bytes."""
    groups, inputs, outputs = matrices(node, constant_weight(node)).shape
    return int(min(ROWS, max(LEAST_ROWS, memory // (4 * groups * (inputs + outputs)))))


def _joined(
    plan: QuantPlan,
    node: ir.Node,
    parts: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]],
    random: np.random.Generator,
) -> Rows:
    """The rows of all samples in random order, so that each batch holds some of many samples."""
    x, y = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
    order = random.permutation(x.shape[1])
    activation = questions.fused_activation(node)
    bounds = (-math.inf, math.inf) if activation is None else questions.activation_bounds(activation)
    groups, _, outputs = y.shape
    # A MatMul's bias is added behind it.
    bias = np.zeros(groups * outputs) if node.op_type == "MatMul" else present_bias(plan, node, groups * outputs)
    columns = bias.reshape(groups, 1, outputs).astype(np.float32)
    return Rows(x[:, order], y[:, order], columns, bounds, has_place_for_bias(node, constant_weight(node)))


def _rounded(plan: QuantPlan, node: ir.Node, rows: Rows) -> QuantPlan:
    """The plan with one layer's weight rounded and its bias shifted; as it was, where the rows are too few to tell."""
    weight, name = constant_weight(node), questions.name_of(node.inputs[1])
    if rows.x.shape[1] < rows.x.shape[2]:
        return plan
    grid = neighbours(weight, plan.weights[name])
    found, shift = choose(rows, *(matrices(node, each) for each in (weight, *grid)))
    plan = replace(plan, replaced={**plan.replaced, name: stored_layout(node, found, weight.shape)})
    if not rows.takes_shift:
        return plan
    bias = (present_bias(plan, node, shift.size) + shift.reshape(-1)).astype(np.float32)
    return replace(plan, biases={**plan.biases, str(node.name): bias})
