"""AdaRound: round each weight up or down so that its layer's output changes least, not the weight itself.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization" (arXiv 2004.10568), with the
activation behind the layer in the loss, and asymmetric: a layer reads what the network quantized so far gives it, and
comes as close as it can to the float network's output, so that it takes back part of what the layers before it lost.
"""

from __future__ import annotations

import math
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
from qdeploy.recover.layer_data import Tap, constant_weight, simulate, weighted_nodes
from qdeploy.recover.recovery import Recovery
from qdeploy.recover.rounding import Rows, choose, neighbours
from qdeploy.recover.rows import input_rows, is_product, matrices, output_rows, position_count, stored_layout

if TYPE_CHECKING:
    import onnx_ir as ir

NAME = "adaround"

ROWS = 4096
"""Output positions of a layer, over all samples, that its rounding is chosen by."""

LAYER_BYTES = 1 << 26
LEAST_ROWS = 256
"""A layer whose rows would take more memory than that gets fewer of them, but no fewer than these."""


def adaround(recovery: Recovery) -> Recovery:
    """The recovery with the weights of Conv, Gemm and MatMul rounded up or down, layer after layer.

    A weight never moves by more than one step of its grid. Biases move along, and later corrections leave them alone.
    Rounded to nearest stay the weights of ConvTranspose, batched ones, those that several nodes read, and those of a
    layer that has fewer output positions over all samples than inputs: too few to tell.

    For each layer it costs a pass over the samples, through the float and the quantized network up to that layer, and
    an optimization; nothing at run time.

    Raises:
        UnavailableError: torch is not installed.
        InputError: The samples are not at hand.
    """
    _require_torch()
    graph = questions.load_graph(recovery.plan.model.path)
    nodes = [node for node in weighted_nodes(recovery.plan, graph) if is_product(node) and _is_sole_reader(node)]
    for node in nodes:
        recovery = replace(recovery, plan=_rounded(recovery.plan, node, _collect(recovery, node)))
    return replace(recovery, plan=replace(recovery.plan, steps=(*recovery.plan.steps, NAME)))


def _require_torch() -> None:
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise UnavailableError("AdaRound needs torch.", "Install it: pip install 'qdeploy[torch]'")


def _is_sole_reader(node: ir.Node) -> bool:
    return len(node.inputs[1].uses()) == 1


def _collect(recovery: Recovery, node: ir.Node) -> Rows:
    """The rows of one layer, from a pass over the samples; in random order, so that each batch is of many samples."""
    plan, samples = recovery.plan, recovery.require_samples(NAME)
    each = math.ceil(_row_limit(node) / recovery.statistics.samples)
    random = np.random.default_rng(0)
    xs, ys = [], []
    with TemporaryDirectory(dir=recovery.require_means(NAME).folder) as name:
        path, simulation = Path(name), simulate(plan)
        (source,) = (questions.name_of(n.inputs[0]) for n in simulation.graph if n.name == node.name)
        result = questions.name_of(questions.result_of(node))
        exact = Tap(questions.load_graph(plan.model.path), [result], path / "float.onnx", "all")
        quantized = Tap(simulation, [source], path / "quantized.onnx")
        for sample in samples:
            x, y = quantized(sample)[source], exact(sample)[result]
            count = position_count(node, y)
            chosen = random.choice(count, min(each, count), replace=False)
            xs.append(input_rows(node, x, chosen, y.shape))
            ys.append(output_rows(node, y, chosen))
    order = random.permutation(sum(part.shape[1] for part in xs))
    y = np.concatenate(ys, axis=1)[:, order]
    has_place = has_place_for_bias(node, constant_weight(node))
    return Rows(np.concatenate(xs, axis=1)[:, order], y, _bias(plan, node, y), _bounds(node), has_place)


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
    if rows.x.shape[1] < rows.x.shape[2]:
        return plan
    grid = neighbours(weight, plan.weights[name])
    found, shift = choose(rows, *(matrices(node, each) for each in (weight, *grid)))
    plan = replace(plan, replaced={**plan.replaced, name: stored_layout(node, found, weight.shape)})
    if not rows.takes_shift:
        return plan
    bias = (present_bias(plan, node, shift.size) + shift.reshape(-1)).astype(np.float32)
    return replace(plan, biases={**plan.biases, str(node.name): bias})
