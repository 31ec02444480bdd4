"""Empirical bias correction: give every output channel the mean that it has in the float network, as measured.

What shifts a mean is more than the layer's own rounding: its input is shifted by the layers before, by the rounding of
activations and by their saturation. Running the samples shows all of it (Nagel et al. 2019, arXiv 1906.04721,
appendix D):

    b ← b + E[W · x] − E[Ŵ · x̂]        x̂: the layer's input in the network quantized and corrected so far
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.plan import QuantPlan
from qdeploy.recover.bias_correction import has_place_for_bias
from qdeploy.recover.layer_data import Probe, blocks, rounded_constant, simulate, weighted_nodes
from qdeploy.recover.recovery import Recovery
from qdeploy.samples.source import Sample

if TYPE_CHECKING:
    import onnx_ir as ir

NAME = "bias-correction-empirical"


def bias_correction_empirical(recovery: Recovery) -> Recovery:
    """The recovery with the biases that give each weighted node the float network's channel means on the samples.

    It replaces what an earlier bias correction did, and comes after all steps that change weights or their rounding.
    It costs one pass over the samples in float and at most 12 through the quantized network, and nothing at run time.

    Raises:
        InputError: The samples are not at hand.
    """
    samples, folder = recovery.require_samples(NAME), recovery.require_means(NAME).folder
    plan = recovery.plan
    graph = questions.load_graph(plan.model.path)
    nodes = [n for n in weighted_nodes(plan, graph) if has_place_for_bias(n, questions.weight_of(n))]
    with TemporaryDirectory(dir=folder) as name:
        path = Path(name) / "model.onnx"
        with_bias = {str(node.name): _output_with_bias(node) for node in nodes}
        wanted = _channel_means(
            Probe(questions.load_graph(plan.model.path), with_bias.values(), path, "all"), nodes, with_bias, samples
        )
        for start, block in blocks(nodes):
            simulation = simulate(plan, nodes[start:])
            without_bias = {str(node.name): _add_rounded_twin(simulation, node, plan) for node in block}
            found = _channel_means(Probe(simulation, without_bias.values(), path), block, without_bias, samples)
            biases = {node: (wanted[node] - mean).astype(np.float32) for node, mean in found.items()}
            plan = replace(plan, biases={**plan.biases, **biases})
    return replace(recovery, plan=replace(plan, steps=(*plan.steps, NAME)))


def _output_with_bias(node: ir.Node) -> str:
    """The tensor that a node's bias has been added to: a MatMul's is written by the Add behind it."""
    reader, _ = questions.bias_input(node) or (node, 2)
    return questions.name_of(reader.outputs[0])


def _add_rounded_twin(simulation: ir.Model, node: ir.Node, plan: QuantPlan) -> str:
    """Let a node be computed beside itself with its rounded weight and no bias; gives the name of what it writes.

    x̂ ─► Conv(W, b) ─► …        becomes        x̂ ─┬─► Conv(W, b) ─► …
                                                  └─► Conv(Ŵ) ─► twin
    """
    import onnx_ir as ir

    name = f"{node.name}/rounded"
    weight = rounded_constant(plan, node.inputs[1])
    constant = ir.val(f"{name}/weight", const_value=ir.tensor(weight, name=f"{name}/weight"))
    simulation.graph.register_initializer(constant)
    source = next(each.inputs[0] for each in simulation.graph if each.name == node.name)
    twin = ir.node(node.op_type, [source, constant], dict(node.attributes), name=name)
    twin.outputs[0].name, twin.outputs[0].type = name, node.outputs[0].type
    simulation.graph.append(twin)
    return name


def _channel_means(
    probe: Probe, nodes: Sequence[ir.Node], tensors: Mapping[str, str], samples: Iterable[Sample]
) -> dict[str, NDArray[np.float64]]:
    """The mean of each output channel over all samples, by node name.

    Args:
        probe: Gives the tensors.
        nodes: Weighted nodes.
        tensors: The tensor of each, by node name.
        samples: Run one after another; sums are float64, and each value counts the same.
    """
    sums: dict[str, NDArray[np.float64]] = {}
    counts = dict.fromkeys(tensors, 0)
    for sample in samples:
        found = probe(sample)
        for node in nodes:
            name, axis = str(node.name), questions.output_channel_axis(node)
            assert axis is not None
            channels = np.moveaxis(found[tensors[name]], axis, 0)
            channels = channels.reshape(channels.shape[0], -1)
            sums[name] = sums.get(name, 0.0) + channels.sum(axis=1, dtype=np.float64)
            counts[name] += channels.shape[1]
    return {name: total / counts[name] for name, total in sums.items()}
