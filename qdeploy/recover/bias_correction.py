"""Analytic bias correction: take back the mean shift that weight rounding causes.

Rounding W to Ŵ shifts the mean of an operator's output by Σ (Ŵ − W) · E[x], with E[x] the mean of each input channel.
Subtracting that from the bias costs nothing at run time (Nagel et al. 2019, arXiv 1906.04721, section 4.2).
The means come from the calibration pass; borders, where padding lowers them, are treated like the interior.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.affine import fake_quantize
from qdeploy.plan import QuantPlan
from qdeploy.statistics import Statistics, TensorStatistics

if TYPE_CHECKING:
    import onnx_ir as ir

NAME = "bias-correction"


def bias_correction(plan: QuantPlan, statistics: Statistics) -> QuantPlan:
    """The plan with the bias of every weighted, quantized node corrected for its own weight rounding."""
    statistics.require_model(plan.model.digest)
    graph = questions.load_graph(plan.model.path)
    biases = dict(plan.biases)
    for node in graph.graph:
        weight = questions.weight_of(node)
        if weight is None or not plan.nodes[str(node.name)].quantized or not has_place_for_bias(node, weight):
            continue
        name = questions.name_of(node.inputs[1])
        tensor = statistics.tensors.get(questions.name_of(node.inputs[0]))
        if name not in plan.weights or tensor is None or tensor.channel_axis != questions.input_channel_axis(node):
            continue
        exact = plan.replaced.get(name, weight)
        shift = output_shift(node, fake_quantize(exact, plan.weights[name]) - exact, tensor)
        biases[str(node.name)] = (present_bias(plan, node, shift.size) - shift).astype(np.float32)
    return replace(plan, biases=biases, steps=(*plan.steps, NAME))


def output_shift(node: ir.Node, change: NDArray[np.float32], inputs: TensorStatistics) -> NDArray[np.float64]:
    """Mean change of each output channel when the weight changes.

    Args:
        node: A Conv, ConvTranspose, Gemm or MatMul of a prepared graph, where a Gemm has no factors.
        change: Ŵ − W, in the weight's stored layout.
        inputs: Statistics of input 0, per channel.
    """
    mean = inputs.channel_mean
    delta = change.astype(np.float64)
    if node.op_type == "Conv":  # [out, in / groups, …]
        groups = node.attributes.get_int("group", 1)
        per_group = delta.reshape(groups, delta.shape[0] // groups, delta.shape[1], -1).sum(axis=-1)
        return np.asarray(np.einsum("goi,gi->go", per_group, mean.reshape(groups, -1))).reshape(-1)
    if node.op_type == "ConvTranspose":  # [in, out / groups, …]; an output value meets 1 / Π strides of the kernel
        groups = node.attributes.get_int("group", 1)
        overlap = int(np.prod(node.attributes.get_ints("strides", [1])))
        per_group = delta.reshape(groups, delta.shape[0] // groups, delta.shape[1], -1).sum(axis=-1) / overlap
        return np.asarray(np.einsum("gio,gi->go", per_group, mean.reshape(groups, -1))).reshape(-1)
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0):
        delta = delta.T
    return np.asarray(mean @ delta)


def has_place_for_bias(node: ir.Node, weight: NDArray[np.float32]) -> bool:
    """Conv and Gemm take a bias that is not there yet; a MatMul only has the Add behind it, a computed one stays."""
    if node.op_type == "MatMul" and weight.ndim > 2:
        return False  # each item of a batch has a shift of its own
    if questions.bias_input(node) is not None:
        return True
    absent = len(node.inputs) < 3 or node.inputs[2] is None
    return node.op_type != "MatMul" and absent


def present_bias(plan: QuantPlan, node: ir.Node, channels: int) -> NDArray[np.float64]:
    """The node's present bias, one value a channel."""
    if str(node.name) in plan.biases:
        return plan.biases[str(node.name)].astype(np.float64)
    place = questions.bias_input(node)
    array = questions.constant(place[0].inputs[place[1]]) if place else None
    if array is None:
        return np.zeros(channels)
    return np.broadcast_to(array.reshape(-1).astype(np.float64), (channels,))
