"""Conv and ConvTranspose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qdeploy.backends.coreml.call import Call, Handler, is_static

if TYPE_CHECKING:
    import onnx_ir as ir

AUTO_PADS = {"VALID": "valid", "SAME_UPPER": "same", "SAME_LOWER": "same_lower"}
ATTRIBUTES = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def interleaved(pads: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """ONNX's [begin, begin, …, end, end, …] as MIL's [begin, end, begin, end, …]."""
    return np.array(pads, np.int32).reshape(2, -1).T.ravel()


def padding(call: Call, spatial: int) -> dict[str, Any]:
    """MIL's pad_type and pad for auto_pad and pads."""
    auto = call.text("auto_pad", "NOTSET")
    if auto != "NOTSET":
        return {"pad_type": AUTO_PADS[auto]}
    return {"pad_type": "custom", "pad": interleaved(call.integers("pads", [0] * 2 * spatial))}


def per_axis(call: Call, name: str, spatial: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """An attribute with one number for each spatial axis, 1 by default."""
    return np.array(call.integers(name, [1] * spatial), np.int32)


def convolve(call: Call) -> Any:
    """A convolution of one to three dimensions, with its bias."""
    spatial = call.rank(0) - 2
    bias = {"bias": call.known(2)} if call.has(2) else {}
    return call.mb.conv(
        x=call.var(0),
        weight=call.weight(1),
        strides=per_axis(call, "strides", spatial),
        dilations=per_axis(call, "dilations", spatial),
        groups=np.int32(call.integer("group", 1)),
        **padding(call, spatial),
        **bias,
    )


def transposed_pads(call: Call, spatial: int) -> tuple[list[int], list[int]]:
    """What to cut from the begin and the end of each spatial axis of the full result; less than 0 is to be added.

    The full result has (d − 1)·stride + (k − 1)·dilation + 1 values along an axis (ONNX, ConvTranspose).
    """
    extra = call.integers("output_padding", [0] * spatial)
    auto, wanted = call.text("auto_pad", "NOTSET"), call.integers("output_shape", [])[-spatial:]
    if auto in ("NOTSET", "VALID") and not wanted:
        pads = call.integers("pads", [0] * 2 * spatial)
        return pads[:spatial], [end - more for end, more in zip(pads[spatial:], extra, strict=True)]
    sizes, strides = call.shape(0)[2:], per_axis(call, "strides", spatial)
    wanted = wanted or [int(size * stride) for size, stride in zip(sizes, strides, strict=True)]
    kernels = (np.array(call.shape(1)[2:]) - 1) * per_axis(call, "dilations", spatial) + 1
    total = [(d - 1) * s + k - w for d, s, k, w in zip(sizes, strides, kernels, wanted, strict=True)]
    begin = [
        int(t + e) // 2 if auto == "SAME_UPPER" else int(t + e) - int(t + e) // 2
        for t, e in zip(total, extra, strict=True)
    ]
    return begin, [int(t) - b for t, b in zip(total, begin, strict=True)]


def convolve_transposed(call: Call) -> Any:
    """A transposed convolution; where output_padding reaches past the full result, zeros are put behind it.

    ConvTranspose        becomes        conv_transpose ─► [pad ─► add(bias)]
    """
    spatial = call.rank(0) - 2
    begin, end = transposed_pads(call, spatial)
    missing = [max(0, -e) for e in end]
    late_bias = call.has(2) and any(missing)
    bias = {"bias": call.known(2)} if call.has(2) and not late_bias else {}
    y = call.mb.conv_transpose(
        x=call.var(0),
        weight=call.weight(1),
        strides=per_axis(call, "strides", spatial),
        dilations=per_axis(call, "dilations", spatial),
        groups=np.int32(call.integer("group", 1)),
        pad_type="custom",
        pad=interleaved([*(max(0, b) for b in begin), *(max(0, e) for e in end)]),
        **bias,
    )
    if any(missing):
        y = call.mb.pad(x=y, pad=interleaved([*[0] * spatial, *missing]), mode="constant", constant_val=np.float32(0))
    return call.mb.add(x=y, y=call.known(2).reshape(-1, *[1] * spatial)) if late_bias else y


def transposed_objections(node: ir.Node) -> Iterator[str]:
    """Sizes that a formula needs must be known."""
    value = node.inputs[0]
    sized = node.attributes.get_string("auto_pad", "NOTSET").startswith("SAME") or "output_shape" in node.attributes
    if sized and value is not None and value.shape is not None and not is_static(list(value.shape)[2:]):
        yield "auto_pad or output_shape with an input of dynamic size"


HANDLERS = {
    "Conv": Handler(convolve, ATTRIBUTES, (1, 2)),
    "ConvTranspose": Handler(
        convolve_transposed, (*ATTRIBUTES, "output_padding", "output_shape"), (1, 2), transposed_objections
    ),
}
