"""Empirical bias correction: give every output channel the mean that it has in the float network, as measured.

What shifts a mean is more than the layer's own rounding: its input is shifted by the layers before, by the rounding of
activations and by their saturation. Running the samples shows all of it (Nagel et al. 2019, arXiv 1906.04721,
appendix D):

    b ← b + E[W · x] − E[Ŵ · x̂]        x̂: the layer's input in the network quantized and corrected so far
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.plan import QuantPlan
from qdeploy.recover.bias_correction import has_place_for_bias, present_bias
from qdeploy.recover.flow import Flow
from qdeploy.recover.layer_data import Found, Tap, constant_weight, simulate, weighted_nodes
from qdeploy.recover.recovery import Recovery

if TYPE_CHECKING:
    import onnx_ir as ir

NAME = "bias-correction-empirical"


def bias_correction_empirical(recovery: Recovery) -> Recovery:
    """The recovery with the biases that give each weighted node the float network's channel means on the samples.

    It comes after the weights are final. Layers that AdaRound has rounded keep the biases that it gave them: those
    restore what the activation lets through, and not the mean before it. It costs a pass over the samples in float and
    one through the quantized network; nothing at run time.

    Raises:
        InputError: The samples are not at hand.
    """
    samples, folder = recovery.require_samples(NAME), recovery.require_means(NAME).folder
    plan = recovery.plan
    graph = questions.load_graph(plan.model.path)
    nodes = [node for node in weighted_nodes(plan, graph) if _is_open(plan, node)]
    with TemporaryDirectory(dir=folder) as name:
        path = Path(name) / "float.onnx"
        axes = {questions.name_of(_with_bias(node).outputs[0]): questions.output_channel_axis(node) for node in nodes}
        exact = Tap(questions.load_graph(plan.model.path), axes, path, "all")
        wanted = _channel_means(map(exact, samples), axes)
        flow = Flow(samples, Path(name))
        for node, (tensor, axis) in zip(nodes, axes.items(), strict=True):
            simulation = simulate(plan)
            (output,) = (each.outputs[0] for each in simulation.graph if each.name == _with_bias(node).name)
            result = questions.name_of(output)  # before it is rounded itself
            (found,) = _channel_means(flow.run(simulation, str(node.name), result), {result: axis}).values()
            bias = present_bias(plan, node, found.size) + wanted[tensor] - found
            plan = replace(plan, biases={**plan.biases, str(node.name): bias.astype(np.float32)})
    return replace(recovery, plan=replace(plan, steps=(*plan.steps, NAME)))


def _is_open(plan: QuantPlan, node: ir.Node) -> bool:
    rounded = questions.name_of(node.inputs[1]) in plan.replaced
    return not rounded and has_place_for_bias(node, constant_weight(node))


def _with_bias(node: ir.Node) -> ir.Node:
    """The node that adds a node's bias: itself, or the Add behind a MatMul."""
    reader, _ = questions.bias_input(node) or (node, 2)
    return reader


def _channel_means(samples: Iterable[Found], axes: Mapping[str, int | None]) -> dict[str, NDArray[np.float64]]:
    """The mean of each channel over all samples, by tensor name; sums are float64, and each value counts the same.

    Args:
        samples: The tensors of each.
        axes: The channel axis of each tensor.
    """
    sums: dict[str, NDArray[np.float64]] = {}
    counts = dict.fromkeys(axes, 0)
    for found in samples:
        for name, axis in axes.items():
            assert axis is not None
            channels = np.moveaxis(found[name], axis, 0).reshape(found[name].shape[axis], -1)
            sums[name] = sums.get(name, 0.0) + channels.sum(axis=1, dtype=np.float64)
            counts[name] += channels.shape[1]
    return {name: total / counts[name] for name, total in sums.items()}
