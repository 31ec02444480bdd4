"""QuantizeLinear and DequantizeLinear: MIL's quantize and dequantize, or integers that stay constants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.backends.coreml.call import Call, Handler, IntegerConstant

if TYPE_CHECKING:
    import onnx_ir as ir

TYPES = ("INT8", "UINT8")
"""What MIL quantizes to."""


def grid(call: Call, integer: str) -> tuple[NDArray[np.float32], NDArray[Any], int | None]:
    """Scale, zero point and channel axis; one scale in all has no axis."""
    scale = call.known(1).astype(np.float32)
    zero_point = call.known(2) if call.has(2) else np.zeros(scale.shape, integer)
    if scale.size == 1:
        return scale.reshape(()), zero_point.reshape(()), None
    return scale, zero_point, call.integer("axis", 1) % call.rank(0)


def quantize(call: Call) -> Any:
    """round(x / scale) + zero_point, saturated."""
    integer = call.known(2).dtype.name if call.has(2) else "uint8"
    scale, zero_point, axis = grid(call, integer)
    return call.mb.quantize(input=call.variable(0), output_dtype=integer, **_parameters(scale, zero_point, axis))


def dequantize(call: Call) -> Any:
    """(q − zero_point) · scale; an int32 bias becomes float, int8 constants stay integers until they are read."""
    data = call.operands[0]
    if not isinstance(data, np.ndarray):
        scale, zero_point, axis = grid(call, "int8")
        return call.mb.dequantize(input=data, **_parameters(scale, zero_point, axis))
    integers = IntegerConstant(data, *grid(call, data.dtype.name))
    return integers if data.dtype.name in ("int8", "uint8") else integers.real()


def _parameters(scale: NDArray[np.float32], zero_point: NDArray[Any], axis: int | None) -> dict[str, Any]:
    if axis is None:
        return {"scale": scale[()], "zero_point": zero_point[()]}
    return {"scale": scale, "zero_point": zero_point, "axis": np.int32(axis)}


def objections(node: ir.Node) -> Iterator[str]:
    """Blocks, and integers of other widths; an int32 bias must be constant."""
    stored = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    if node.attributes.get_int("block_size", 0):
        yield "block_size (blocks need iOS 18)"
    if stored is None or stored.dtype is None or stored.dtype.name in TYPES:
        return
    if node.op_type == "QuantizeLinear" or stored.dtype.name != "INT32" or stored.const_value is None:
        yield f"{stored.dtype.name.lower()} (Core ML quantizes to int8 and uint8)"


HANDLERS = {
    "QuantizeLinear": Handler(
        quantize, ("axis", "saturate", "block_size", "output_dtype"), (1, 2), objections=objections
    ),
    "DequantizeLinear": Handler(dequantize, ("axis", "block_size", "output_dtype"), (1, 2), objections=objections),
}
