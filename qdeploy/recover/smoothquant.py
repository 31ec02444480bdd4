"""SmoothQuant: outlier channels of activations are made smaller, and the weights that read them larger.

Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (arXiv
2211.10438, section 4). For each channel j of the input X of products with constant weights W:

    X · W  =  (X / s) · (s · W)        sⱼ = max|Xⱼ|^α / max|Wⱼ|^(1 − α)        α = ½

The division is folded into what computes X, so that nothing is added to the graph: the scale and bias of a
LayerNormalization (or the Mul and Add that it was taken apart into), or the weight of another product. Where X is
computed otherwise, or something besides those products reads it, X stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.recover import channels
from qdeploy.recover.recovery import Recovery
from qdeploy.statistics import TensorStatistics

if TYPE_CHECKING:
    import onnx_ir as ir

NAME = "smoothquant"

STRENGTH = 0.5
"""α: how much of the difficulty moves from activations to weights; the paper's value for most models."""


@dataclass(frozen=True)
class Place:
    """A constant that the channels of a value are proportional to.

    Attributes:
        node: Reads it.
        index: At which input.
        channels: The channel of each of its elements, or None if it is one value a channel along the last axis.
    """

    node: ir.Node
    index: int
    channels: NDArray[np.intp] | None = None


@dataclass(frozen=True)
class Group:
    """Products that read one value, and the constants that scale its channels.

    Attributes:
        value: What they read.
        products: MatMul or Gemm nodes, all that read the value.
        places: Dividing each of these constants by s divides the value by s.
    """

    value: ir.Value
    products: tuple[ir.Node, ...]
    places: tuple[Place, ...]


def smoothquant(recovery: Recovery) -> Recovery:
    """The recovery on a float graph with smoothed activations, whose outputs are the same.

    Raises:
        InputError: There are no samples to collect statistics from anew.
    """
    recovery.require_samples(NAME)
    recovery.statistics.require_model(recovery.plan.model.digest)
    graph = questions.load_graph(recovery.plan.model.path)
    groups = list(groups_of(graph))
    if not groups:
        return recovery.with_step(NAME)
    for group in groups:
        smooth(group, smoothing_factors(group, recovery.statistics.tensors[questions.name_of(group.value)]))
    return recovery.on_graph(graph, NAME)


def groups_of(graph: ir.Model) -> Iterator[Group]:
    """Every value of a prepared graph that can be smoothed, in graph order."""
    for node in graph.graph:
        value = node.outputs[0]
        products = tuple(value.consumers())
        if value.is_graph_output() or not products or not all(_reads_channels(each, value) for each in products):
            continue
        places = _places(node, channels.number_of_inputs(products[0]))
        if places:
            yield Group(value, products, tuple(places))


def _reads_channels(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node multiplies the last axis of a value with a constant matrix of its own, and reads it only there."""
    weight = questions.weight_of(node) if node.op_type in ("MatMul", "Gemm") else None
    if weight is None or weight.ndim != 2 or weight.dtype != np.float32 or len(node.inputs[1].uses()) != 1:
        return False
    return [each is value for each in node.inputs].count(True) == 1 and not node.attributes.get_int("transA", 0)


def _places(node: ir.Node, number: int) -> list[Place]:
    """The constants that a node's output is proportional to, channel by channel; none if there are no such."""
    if node.op_type == "LayerNormalization":
        vectors = all(_is_vector(value, number) for value in node.inputs[1:])
        return [Place(node, index) for index in range(1, len(node.inputs))] if vectors else []
    if node.op_type in ("MatMul", "Gemm"):
        return _product_places(node, number)
    index = next((i for i, value in enumerate(node.inputs) if _is_vector(value, number)), None)
    if index is None or node.op_type not in ("Mul", "Add"):
        return []
    if node.op_type == "Mul":
        return [Place(node, index)]
    inner = node.inputs[1 - index]
    producer = inner.producer() if inner is not None and questions.sole_consumer(inner) is node else None
    places = _places(producer, number) if producer is not None and producer.op_type in ("Mul", "MatMul") else []
    return [*places, Place(node, index)] if places else []


def _product_places(node: ir.Node, number: int) -> list[Place]:
    weight = questions.weight_of(node)
    addend = node.inputs[2] if len(node.inputs) > 2 else None
    if weight is None or weight.ndim != 2 or channels.number_of_outputs(node) != number:
        return []
    if addend is not None and not _is_vector(addend, number):
        return []
    bias = [Place(node, 2)] if addend is not None else []
    return [Place(node, 1, channels.output_channels(node, weight)), *bias]


def _is_vector(value: ir.Value | None, number: int) -> bool:
    """Whether a value is a float constant with one entry for each of a number of channels, along its last axis."""
    array = questions.constant(value)
    return (
        array is not None and array.dtype == np.float32 and array.ndim > 0 and array.size == array.shape[-1] == number
    )


def smoothing_factors(group: Group, inputs: TensorStatistics) -> NDArray[np.float64]:
    """The s of each channel, float64 [channels]; 1 where the value or the weights are zero.

    Args:
        group: The products that read the value.
        inputs: Statistics of the value, per channel.
    """
    activation = np.maximum(np.abs(inputs.channel_minimum), np.abs(inputs.channel_maximum)).astype(np.float64)
    weight = np.max([_weight_peaks(node) for node in group.products], axis=0)
    live = (activation > 0) & (weight > 0) & (inputs.channel_count > 0)
    factors = np.ones(weight.size)
    factors[live] = activation[live] ** STRENGTH / weight[live] ** (1 - STRENGTH)
    return factors


def _weight_peaks(node: ir.Node) -> NDArray[np.float64]:
    weight = questions.weight_of(node)
    assert weight is not None
    return channels.channel_peaks(weight, channels.input_channels(node, weight))


def smooth(group: Group, factors: NDArray[np.float64]) -> None:
    """Divide the value by the factors, and multiply the weights that read it."""
    for node in group.products:
        weight = questions.weight_of(node)
        assert weight is not None
        channels.set_constant(node, 1, weight * factors[channels.input_channels(node, weight)])
    for place in group.places:
        array = questions.constant(place.node.inputs[place.index])
        assert array is not None
        channels.set_constant(place.node, place.index, array / _of_channels(factors, place))


def _of_channels(factors: NDArray[np.float64], place: Place) -> NDArray[Any]:
    return factors if place.channels is None else factors[place.channels]
