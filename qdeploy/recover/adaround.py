"""AdaRound: round each weight up or down so that the layer's output changes least, not the weight itself.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization" (arXiv 2004.10568). Of the two grid
values around each weight, W⁻ and W⁺, with a the activation behind the layer, x its input in the float network and x̂
the one in the network as it is quantized so far:

    Ŵ = W⁻ + (W⁺ − W⁻) · h(V)        h(V) = clip(1.2 · sigmoid(V) − 0.1, 0, 1)
    min over V of   Σ (a(Ŵx̂ + b) − a(Wx + b))²  +  λ · Σ (1 − |2·h(V) − 1|^β)

The second term is annealed (β from 20 to 2) until each h(V) is near 0 or 1, and is made one of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.affine import Affine, dequantize, fake_quantize, quantize
from qdeploy.errors import UnavailableError
from qdeploy.plan import QuantPlan
from qdeploy.recover.bias_correction import present_bias
from qdeploy.recover.layer_data import Probe, blocks, exact_weight, simulate, weighted_nodes
from qdeploy.recover.recovery import Recovery
from qdeploy.recover.rows import input_rows, is_product, matrices, output_rows, position_count, stored_layout
from qdeploy.samples.source import Sample

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

NAME = "adaround"

ROWS = 4096
"""Output positions, over all samples, by which a layer's rounding is chosen."""

LAYER_BYTES = 1 << 26
"""A layer whose rows would take more memory gets fewer of them."""

ITERATIONS = 1000
BATCH = 256
LEARNING_RATE = 0.03
REGULARIZATION = 0.1
WARM_START = 0.2
"""Share of the iterations before the regularization sets in."""

FIRST_BETA, LAST_BETA = 20.0, 2.0
HIGH, LOW = 1.1, -0.1
"""The sigmoid is stretched to these, so that it reaches 0 and 1."""


@dataclass(frozen=True)
class Rows:
    """A layer as one product of matrices for each group, y = a(x · W + b), at some of its output positions.

    Attributes:
        x: Its input in the quantized network, float32 [groups, rows, inputs].
        y: Its output behind the activation in the float network, float32 [groups, rows, outputs].
        bias: float32 [groups, 1, outputs].
        bounds: Of the activation; infinite without one.
    """

    x: NDArray[np.float32]
    y: NDArray[np.float32]
    bias: NDArray[np.float32]
    bounds: tuple[float, float]


def adaround(recovery: Recovery) -> Recovery:
    """The recovery with the weights of each Conv, Gemm and MatMul rounded up or down, in graph order.

    No weight moves by more than one step, and where rounding to nearest does better on an output channel, that stays.
    Weights of ConvTranspose, batched ones and those that several nodes read stay rounded to nearest.
    Costs at most 12 passes over the samples, and 1000 steps of optimization a layer.

    Raises:
        UnavailableError: torch is not installed.
        InputError: The samples are not at hand.
    """
    _require_torch()
    samples, folder = recovery.require_samples(NAME), recovery.require_means(NAME).folder
    plan = recovery.plan
    graph = questions.load_graph(plan.model.path)
    nodes = [n for n in weighted_nodes(plan, graph) if is_product(n) and len(n.inputs[1].uses()) == 1]
    waiting = [questions.name_of(node.inputs[1]) for node in nodes]
    for block in blocks(nodes):
        rounded = {}
        for node, rows in zip(
            block, _collect(plan, block, waiting, samples, recovery.statistics.samples, folder), strict=True
        ):
            rounded[questions.name_of(node.inputs[1])] = _rounded(plan, node, rows)
        waiting = [name for name in waiting if name not in rounded]
        plan = replace(plan, replaced={**plan.replaced, **rounded})
    return replace(recovery, plan=replace(plan, steps=(*plan.steps, NAME)))


def _require_torch() -> None:
    try:
        import torch  # noqa: F401 - only whether it is there
    except ModuleNotFoundError as error:
        raise UnavailableError("torch is not installed.", "Install it: pip install 'qdeploy[torch]'") from error


def _collect(
    plan: QuantPlan,
    block: Sequence[ir.Node],
    waiting: Collection[str],
    samples: Iterable[Sample],
    count: int,
    folder: Path,
) -> list[Rows]:
    """The rows of each layer of a block, in one pass over the samples."""
    random = np.random.default_rng(0)
    found: list[tuple[list, list]] = [([], []) for _ in block]
    with TemporaryDirectory(dir=folder) as name:
        results = [questions.name_of(questions.result_of(node)) for node in block]
        exact = Probe(questions.load_graph(plan.model.path), results, Path(name) / "float.onnx", "all")
        simulation = simulate(plan, frozenset(waiting))
        by_name = {node.name: node for node in simulation.graph}
        sources = [questions.name_of(by_name[node.name].inputs[0]) for node in block]
        rounded = Probe(simulation, sources, Path(name) / "quantized.onnx")
        for sample in samples:
            expected, given = exact(sample), rounded(sample)
            for node, result, source, (xs, ys) in zip(block, results, sources, found, strict=True):
                y = expected[result]
                total = position_count(node, y)
                number = min(total, -(-_row_limit(node) // count))
                chosen = random.choice(total, number, replace=False)
                xs.append(input_rows(node, given[source], chosen, y.shape))
                ys.append(output_rows(node, y, chosen))
    return [_shuffled(plan, node, xs, ys, random) for node, (xs, ys) in zip(block, found, strict=True)]


def _shuffled(plan, node, xs, ys, random):
    x, y = np.concatenate(xs, axis=1), np.concatenate(ys, axis=1)
    order = random.permutation(x.shape[1])
    activation = questions.fused_activation(node)
    bounds = questions.activation_bounds(activation) if activation is not None else (-np.inf, np.inf)
    groups, _, outputs = y.shape
    bias = present_bias(plan, node, groups * outputs) if node.op_type != "MatMul" else np.zeros(groups * outputs)
    return Rows(
        np.ascontiguousarray(x[:, order]),
        np.ascontiguousarray(y[:, order]),
        bias.reshape(groups, 1, outputs).astype(np.float32),
        bounds,
    )


def _row_limit(node: ir.Node) -> int:
    weight = questions.weight_of(node)
    assert weight is not None
    groups, inputs, outputs = matrices(node, weight).shape
    return min(ROWS, max(BATCH, LAYER_BYTES // (4 * groups * (inputs + outputs))))


def _rounded(plan: QuantPlan, node: ir.Node, rows: Rows) -> NDArray[np.float32]:
    weight, affine = exact_weight(plan, node), plan.weights[questions.name_of(node.inputs[1])]
    low, high = neighbours(weight, affine)
    nearest = fake_quantize(weight, affine)
    found = round_layer(rows, *(matrices(node, each) for each in (weight, low, high, nearest)))
    return stored_layout(node, found, weight.shape)


def neighbours(weight: NDArray[np.float32], affine: Affine) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The grid values below and above each weight; one value for both where the grid ends."""
    nearest = quantize(weight, affine).astype(np.int32)
    below = nearest - (dequantize(nearest, affine) > weight)
    limits = affine.integer.qmin, affine.integer.qmax
    return dequantize(np.clip(below, *limits), affine), dequantize(np.clip(below + 1, *limits), affine)


def round_layer(rows, weight, low, high, nearest):
    import torch

    x, y, bias = (torch.from_numpy(a) for a in (rows.x, rows.y, rows.bias))
    weight, low, high, nearest = (torch.from_numpy(np.ascontiguousarray(a)) for a in (weight, low, high, nearest))
    span = high - low

    def errors(w, part):
        out = torch.baddbmm(bias, x[:, part], w).clamp(*rows.bounds)
        return (out - y[:, part]).square().mean(dim=1, keepdim=True)

    whole = slice(None)
    reference = errors(nearest, whole)
    fraction = torch.where(span > 0, (weight - low) / span, 0.5).clamp(0, 1)
    v = torch.logit((fraction - LOW) / (HIGH - LOW)).requires_grad_()
    adam = torch.optim.Adam([v], LEARNING_RATE, fused=True)
    inv = torch.where(reference > 0, 1 / reference, 0)
    n = x.shape[1]
    batch = min(BATCH, n)
    for step in range(ITERATIONS):
        start = step * batch % (n - batch + 1)
        part = slice(start, start + batch)
        up = (torch.sigmoid(v) * (HIGH - LOW) + LOW).clamp(0, 1)
        loss = (errors(low + span * up, part) * inv).sum()
        progress = (step / ITERATIONS - WARM_START) / (1 - WARM_START)
        if progress >= 0:
            beta = FIRST_BETA + (LAST_BETA - FIRST_BETA) * progress
            loss = loss + REGULARIZATION * (1 - (2 * up - 1).abs() ** beta).mean(dim=1).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad():
        found = torch.where(v > 0, high, low)
        better = errors(found, whole) < reference
        res = torch.where(better, found, nearest)
        STATS.append(
            (
                tuple(weight.shape),
                float((errors(res, whole) / reference.clamp_min(1e-30)).mean()),
                float((errors(low + span * up, whole) / reference.clamp_min(1e-30)).mean()),
                float(better.float().mean()),
                float(((up > 0.02) & (up < 0.98)).float().mean()),
                float((res != nearest).float().mean()),
            )
        )
    return res.numpy()


STATS = []
