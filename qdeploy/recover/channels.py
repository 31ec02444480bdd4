"""The channels that a weighted operator reads and writes, and a float graph whose constants are changed along them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions

if TYPE_CHECKING:
    import onnx_ir as ir

Channels = NDArray[np.intp]
"""For each element of a weight, the channel that it belongs to: broadcasts to the weight's shape."""


def output_channels(node: ir.Node, weight: NDArray[Any]) -> Channels:
    """The output channel that each element of a weight contributes to.

    Args:
        node: A Conv, ConvTranspose or Gemm, or a MatMul with a weight of two dimensions.
        weight: Its weight, in the stored layout.
    """
    if node.op_type == "ConvTranspose":  # [in, out / groups, …]
        return _with_group(node, weight)
    return _along(questions.weight_channel_axis(node), weight)


def input_channels(node: ir.Node, weight: NDArray[Any]) -> Channels:
    """The input channel that each element of a weight is multiplied with; arguments as for `output_channels`."""
    if node.op_type == "Conv":  # [out, in / groups, …]
        return _with_group(node, weight)
    return _along(0 if node.op_type == "ConvTranspose" else 1 - questions.weight_channel_axis(node) % 2, weight)


def _along(axis: int, weight: NDArray[Any]) -> Channels:
    shape = [1] * weight.ndim
    shape[axis] = -1
    return np.arange(weight.shape[axis]).reshape(shape)


def _with_group(node: ir.Node, weight: NDArray[Any]) -> Channels:
    """The channels along axis 1 of a weight whose rows belong to groups, counted on from group to group."""
    rows, in_group = weight.shape[:2]
    group = np.arange(rows) * node.attributes.get_int("group", 1) // rows
    channels: Channels = group[:, None] * in_group + np.arange(in_group)
    return channels.reshape(rows, in_group, *[1] * (weight.ndim - 2))


def number_of_outputs(node: ir.Node) -> int:
    """How many channels a weighted node writes."""
    weight = questions.weight_of(node)
    assert weight is not None
    return int(output_channels(node, weight).max()) + 1


def number_of_inputs(node: ir.Node) -> int:
    """How many channels a weighted node reads."""
    weight = questions.weight_of(node)
    assert weight is not None
    return int(input_channels(node, weight).max()) + 1


def number_of_spatial_axes(node: ir.Node) -> int:
    """How many axes lie behind the channels that a weighted node writes."""
    weight = questions.weight_of(node)
    return weight.ndim - 2 if weight is not None and node.op_type in ("Conv", "ConvTranspose") else 0


def channel_peaks(weight: NDArray[Any], channels: Channels) -> NDArray[np.float64]:
    """The largest magnitude of each channel's weights, float64 [channels]."""
    peaks = np.zeros(int(channels.max()) + 1)
    np.maximum.at(peaks, np.broadcast_to(channels, weight.shape).ravel(), np.abs(weight).ravel().astype(np.float64))
    return peaks


def bias_of(node: ir.Node, number: int) -> NDArray[np.float64] | None:
    """A weighted node's constant bias, one value for each of a number of output channels; None without one."""
    place = questions.bias_input(node)
    bias = questions.constant(place[0].inputs[place[1]]) if place is not None else None
    return None if bias is None else np.broadcast_to(bias.reshape(-1).astype(np.float64), (number,))


def last_of(node: ir.Node) -> ir.Node:
    """The node itself, or the Add that holds a MatMul's bias."""
    place = questions.bias_input(node)
    return place[0] if place is not None else node


def set_bias(node: ir.Node, bias: NDArray[Any]) -> None:
    """Give a node that takes one a bias, one value for each output channel."""
    reader, index = questions.bias_input(node) or (node, 2)
    present = questions.constant(reader.inputs[index]) if index < len(reader.inputs) else None
    leading = [1] * (present.ndim - 1) if present is not None else []
    set_constant(reader, index, bias.reshape([*leading, -1]))


def set_constant(node: ir.Node, index: int, array: NDArray[Any]) -> None:
    """Give a node a float32 constant of its own: under the old one's name, unless another node reads that."""
    graph = node.graph
    assert graph is not None
    old = node.inputs[index] if index < len(node.inputs) else None
    if old is not None and len(old.uses()) == 1:
        name = questions.name_of(old)
        graph.initializers.pop(name)
    else:
        name = f"{node.name}/bias" if old is None else f"{old.name}/{node.name}"
    node.resize_inputs(max(len(node.inputs), index + 1))
    node.replace_input_with(index, new_constant(graph, name, array))


def new_constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """A float32 initializer of a graph."""
    import onnx_ir as ir

    value = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array, np.float32), name=name))
    graph.register_initializer(value)
    return value
