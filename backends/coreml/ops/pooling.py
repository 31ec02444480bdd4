"""Poolings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from qdeploy.backends.coreml.call import Call, Handler
from qdeploy.backends.coreml.ops.convolution import padding, per_axis

if TYPE_CHECKING:
    import onnx_ir as ir

ATTRIBUTES = ("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides")


def _window(call: Call) -> dict[str, Any]:
    spatial = call.rank(0) - 2
    ceil = {"ceil_mode": True} if rounds_up(call.node) else {}
    return {
        "kernel_sizes": np.array(call.integers("kernel_shape", []), np.int32),
        "strides": per_axis(call, "strides", spatial),
        **padding(call, spatial),
        **ceil,
    }


def max_pool(call: Call) -> Any:
    """The largest value of each window."""
    return call.mb.max_pool(x=call.var(0), **_window(call))


def average_pool(call: Call) -> Any:
    """The mean of each window, with or without the padding."""
    exclude = not call.integer("count_include_pad", 0)
    return call.mb.avg_pool(x=call.var(0), exclude_padding_from_average=exclude, **_window(call))


def rounds_up(node: ir.Node) -> bool:
    """Whether ceil_mode changes anything: not where the windows fill every axis exactly."""
    if not node.attributes.get_int("ceil_mode", 0):
        return False
    sizes = (
        list(node.inputs[0].shape)[2:] if node.inputs[0] is not None and node.inputs[0].shape is not None else [None]
    )
    kernel = node.attributes.get_ints("kernel_shape", [])
    strides = node.attributes.get_ints("strides", [1] * len(kernel))
    pads = node.attributes.get_ints("pads", [0] * 2 * len(kernel))
    padded = zip(sizes, pads[: len(kernel)], pads[len(kernel) :], kernel, strides, strict=False)
    return any(not isinstance(size, int) or (size + b + e - k) % s for size, b, e, k, s in padded)


def objections(node: ir.Node) -> Iterator[str]:
    """What MIL's poolings do not have, and where their rounding up is another than ONNX's."""
    pads, ceil = node.attributes.get_ints("pads", []), rounds_up(node)
    if any(each != 1 for each in node.attributes.get_ints("dilations", [])):
        yield "dilations"
    if node.attributes.get_int("storage_order", 0):
        yield "storage_order=1"
    if ceil and (list(pads[: len(pads) // 2]) != list(pads[len(pads) // 2 :]) or "auto_pad" in node.attributes):
        yield "ceil_mode=1 with asymmetric padding"
    kernel, strides = node.attributes.get_ints("kernel_shape", []), node.attributes.get_ints("strides", [])
    if ceil and not any(pads) and any(stride > size for stride, size in zip(strides, kernel, strict=False)):
        yield "ceil_mode=1 with strides larger than the window"
    if ceil and node.op_type == "AveragePool":
        yield "ceil_mode=1"


def over_space(operation: str) -> Callable[[Call], Any]:
    """A reduction over all spatial axes, which stay with size 1."""

    def lower(call: Call) -> Any:
        axes = np.arange(2, call.rank(0), dtype=np.int32)
        return getattr(call.mb, operation)(x=call.var(0), axes=axes, keep_dims=True)

    return lower


HANDLERS = {
    "MaxPool": Handler(max_pool, (*ATTRIBUTES, "storage_order"), objections=objections),
    "AveragePool": Handler(average_pool, (*ATTRIBUTES, "count_include_pad"), objections=objections),
    "GlobalAveragePool": Handler(over_space("reduce_mean")),
    "GlobalMaxPool": Handler(over_space("reduce_max")),
}
