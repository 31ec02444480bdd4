"""GPTQ: round a weight input by input, and let those not yet rounded make up for the error.

With x the rows that a layer multiplies by its weight W, and H = Σ xᵀx over the calibration samples, rounding W to Ŵ
changes each output by (w − ŵ)ᵀ H (w − ŵ), w one of W's columns. The inputs are rounded one after another, i the next:

    e = (w_i − ŵ_i) / U_ii        w_j ← w_j − U_ij · e  for each j not yet rounded        UᵀU = (H + λI)⁻¹

with U upper triangular and λ a hundredth of H's mean diagonal; those that carry most come first (Frantar et al. 2022,
"GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323, section 3.3).
Scales are settled beforehand: a block's do not follow what its weights have become.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.affine import Affine, dequantize, quantize, spread
from qdeploy.model import FloatModel
from qdeploy.plan import NodePlan, QuantPlan, quantizable
from qdeploy.quantize.integers import affine_of
from qdeploy.recover.layer_data import Tap, constant_weight, simulate, weighted_nodes
from qdeploy.recover.recovery import Recovery
from qdeploy.recover.rows import input_rows, is_product, matrices, position_count, stored_layout
from qdeploy.samples.source import Sample
from qdeploy.scheme import Form, QuantContract, Scheme

if TYPE_CHECKING:
    import onnx_ir as ir

NAME = "gptq"

DAMPING = 0.01
"""λ as a share of H's mean diagonal (Frantar et al., section 3.3)."""

PORTION_BYTES = 1 << 26
"""The layers whose H take no more memory than that together share a pass over the samples."""

CHUNK_ROWS = 1024
"""Rows of a layer's input that are in memory at once: patches of a convolution take many times its input."""

LAZY = 128
"""Inputs after which those that follow are updated, by one product of matrices (Frantar et al., section 3.3)."""


def gptq(recovery: Recovery) -> Recovery:
    """The recovery with the weights of Conv, Gemm and MatMul rounded so that their outputs change least.

    An output channel that gains nothing on the calibration samples is rounded to nearest. So are the weights of
    ConvTranspose, batched ones, and those that several nodes read.

    Raises:
        InputError: The samples are not at hand.
    """
    samples, folder = recovery.require_samples(NAME), recovery.require_means(NAME).folder
    plan = _rounded(recovery.plan, samples, folder)
    return replace(recovery, plan=replace(plan, steps=(*plan.steps, NAME)))


def gptq_weights(
    model: FloatModel, contract: QuantContract, keep: Sequence[str], samples: Iterable[Sample], folder: Path
) -> Mapping[str, NDArray[np.float32]]:
    """The same for a target whose activations stay float: its weights by name, rounded to the grids of its contract.

    Args:
        model: A prepared model.
        contract: Of the form WEIGHTS or WEIGHT_QDQ.
        keep: Patterns of the nodes that stay float.
        samples: The calibration samples, re-iterable.
        folder: Where to write what does not last.

    Raises:
        InputError: A keep pattern matches nothing, or the model fails on a sample.
    """
    graph = questions.load_graph(model.path)
    chosen = {id(node): rule for node, rule in quantizable(graph, contract, keep)}
    nodes, weights = {}, {}
    for node in graph.graph:
        rule = chosen.get(id(node))
        rounded = rule is not None and is_product(node) and _is_sole_reader(node)
        nodes[str(node.name)] = NodePlan(node.op_type, rounded, "")
        scheme = rule.inputs[1] if rule is not None and rounded else None
        if scheme is not None:
            weights[questions.name_of(node.inputs[1])] = _grid(node, contract, scheme)
    plan = QuantPlan(model, contract, nodes, {}, {}, weights)
    return _rounded(plan, samples, folder).replaced


def _grid(node: ir.Node, contract: QuantContract, scheme: Scheme) -> Affine:
    """Scales and zero points of a node's weight, as the weight lies. The form WEIGHTS means [inputs, outputs]."""
    weight = constant_weight(node)
    if contract.form is not Form.WEIGHTS or not node.attributes.get_int("transB", 0):
        return affine_of(weight, scheme)
    turned = affine_of(weight.T, scheme)
    axis = None if turned.axis is None else 1 - turned.axis
    return replace(turned, scale=turned.scale.T, zero_point=turned.zero_point.T, axis=axis)


def _is_sole_reader(node: ir.Node) -> bool:
    return len(node.inputs[1].uses()) == 1


def _rounded(plan: QuantPlan, samples: Iterable[Sample], folder: Path) -> QuantPlan:
    graph = questions.load_graph(plan.model.path)
    nodes = [node for node in weighted_nodes(plan, graph) if is_product(node) and _is_sole_reader(node)]
    for portion in _portions(nodes):
        hessians = _hessians(plan, portion, samples, folder)
        for node in portion:
            name, weight = questions.name_of(node.inputs[1]), constant_weight(node)
            found = round_weight(node, weight, plan.weights[name], hessians[_source(node)])
            plan = replace(plan, replaced={**plan.replaced, name: found})
    return plan


def _portions(nodes: Sequence[ir.Node]) -> Iterator[list[ir.Node]]:
    """Layers that follow one another, as many as fit into memory together."""
    portion: list[ir.Node] = []
    total = 0
    for node in nodes:
        groups, inputs, _ = matrices(node, constant_weight(node)).shape
        size = 8 * groups * inputs**2
        if portion and total + size > PORTION_BYTES:
            yield portion
            portion, total = [], 0
        portion.append(node)
        total += size
    if portion:
        yield portion


def _source(node: ir.Node) -> str:
    """What a layer's rows are known by: products of the same tensor share them."""
    shared = node.op_type != "Conv" and not node.attributes.get_int("transA", 0)
    return questions.name_of(node.inputs[0]) if shared else f"{node.name}/rows"


def _hessians(
    plan: QuantPlan, nodes: Sequence[ir.Node], samples: Iterable[Sample], folder: Path
) -> dict[str, NDArray[np.float64]]:
    """Σ xᵀx of each layer's rows, [groups, inputs, inputs], by source, from a pass through the network so far."""
    by_source = {_source(node): node for node in nodes}
    sums = {source: _Sum() for source in by_source}
    with TemporaryDirectory(dir=folder) as name:
        simulation = simulate(plan)
        simulated = {node.name: node for node in simulation.graph}
        places = {
            source: [questions.name_of(value) for value in (twin.inputs[0], twin.outputs[0])]
            for source, node in by_source.items()
            for twin in (simulated[node.name],)
        }
        tap = Tap(simulation, [each for place in places.values() for each in place], Path(name) / "portion.onnx")
        for sample in samples:
            found = tap(sample)
            for source, node in by_source.items():
                x, y = (found[each] for each in places[source])
                for rows in _chunks(node, x, y):
                    sums[source].add(rows)
    return {source: each.total() for source, each in sums.items()}


def _chunks(node: ir.Node, x: NDArray[Any], y: NDArray[Any]) -> Iterator[NDArray[np.float32]]:
    count = position_count(node, y)
    for start in range(0, count, CHUNK_ROWS):
        yield input_rows(node, x, np.arange(start, min(start + CHUNK_ROWS, count)), y.shape)


class _Sum:
    """Σ xᵀx of rows [groups, rows, inputs] that come a few at a time, and are multiplied many at a time."""

    def __init__(self) -> None:
        self._waiting: list[NDArray[np.float32]] = []
        self._sum: NDArray[np.float64] | None = None

    def add(self, rows: NDArray[np.float32]) -> None:
        self._waiting.append(rows)
        if sum(each.shape[1] for each in self._waiting) >= CHUNK_ROWS:
            self.total()

    def total(self) -> NDArray[np.float64]:
        if self._waiting:
            rows = np.concatenate(self._waiting, axis=1)
            product = (rows.transpose(0, 2, 1) @ rows).astype(np.float64)
            self._sum = product if self._sum is None else np.add(self._sum, product, out=self._sum)
            self._waiting = []
        assert self._sum is not None
        return self._sum


def round_weight(
    node: ir.Node, weight: NDArray[np.float32], affine: Affine, hessian: NDArray[np.float64]
) -> NDArray[np.float32]:
    """A weight on its grid, in its own layout: each output channel by GPTQ where that changes it less than rounding.

    Args:
        node: The layer.
        weight: Its weight, unrounded.
        affine: The grid.
        hessian: Σ xᵀx of its rows, [groups, inputs, inputs].
    """
    scale, zero_point = (np.broadcast_to(each, weight.shape) for each in spread(affine, weight.shape))
    exact, nearest = (matrices(node, each) for each in (weight, dequantize(quantize(weight, affine), affine)))
    ends = affine.integer.qmin, affine.integer.qmax
    found = compensated(exact, matrices(node, scale), matrices(node, zero_point), ends, hessian)
    better = output_errors(exact, found, hessian) < output_errors(exact, nearest, hessian)
    return stored_layout(node, np.where(better[:, None], found, nearest), weight.shape)


def output_errors(
    weight: NDArray[np.float32], rounded: NDArray[np.float32], hessian: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Σ (x·w − x·ŵ)² over the rows that a hessian was made of, for each output, [groups, outputs]."""
    change = weight.astype(np.float64) - rounded
    errors: NDArray[np.float64] = ((hessian @ change) * change).sum(axis=1)
    return errors


def compensated(
    weight: NDArray[np.float32],
    scale: NDArray[np.float32],
    zero_point: NDArray[Any],
    ends: tuple[int, int],
    hessian: NDArray[np.float64],
) -> NDArray[np.float32]:
    """A weight on its grid after GPTQ.

    Args:
        weight: [groups, inputs, outputs], and so are scale and zero point.
        scale: Of each value.
        zero_point: Of each value.
        ends: The smallest and the largest integer.
        hessian: [groups, inputs, inputs].
    """
    order = np.argsort(-np.diagonal(hessian, axis1=1, axis2=2), axis=1, kind="stable")
    rest, scale, zero_point = (np.take_along_axis(each, order[..., None], 1) for each in (weight, scale, zero_point))
    rest, upper, found = rest.astype(np.float64), _upper(hessian, order), np.empty_like(scale)
    for start in range(0, rest.shape[1], LAZY):
        part = slice(start, start + LAZY)
        errors = np.empty_like(rest[:, part])
        for i in range(start, start + errors.shape[1]):
            integers = np.clip(np.rint(rest[:, i] / scale[:, i]) + zero_point[:, i], *ends)
            found[:, i] = (integers - zero_point[:, i]).astype(np.float32) * scale[:, i]
            error = (rest[:, i] - found[:, i]) / upper[:, i, i, None]
            rest[:, i + 1 : part.stop] -= upper[:, i, i + 1 : part.stop, None] * error[:, None]
            errors[:, i - start] = error
        rest[:, part.stop :] -= upper[:, part, part.stop :].transpose(0, 2, 1) @ errors
    result = np.empty_like(found)
    np.put_along_axis(result, order[..., None], found, 1)
    return result


def _upper(hessian: NDArray[np.float64], order: NDArray[np.intp]) -> NDArray[np.float64]:
    """The upper triangular U with UᵀU = (H + λI)⁻¹, inputs in the given order; one that is always 0 stands alone."""
    turned = np.take_along_axis(np.take_along_axis(hessian, order[..., None], 1), order[:, None], 2)
    diagonal = np.diagonal(turned, axis1=1, axis2=2)
    added = np.where(diagonal == 0, 1.0, DAMPING * diagonal.mean(axis=1, keepdims=True))
    damped = turned + added[..., None] * np.eye(turned.shape[1])
    upper: NDArray[np.float64] = np.linalg.cholesky(np.linalg.inv(damped)).transpose(0, 2, 1)
    return upper
