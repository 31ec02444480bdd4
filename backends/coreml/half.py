"""What float16 cannot hold, found before it turns into wrong answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.errors import InputError
from qdeploy.graph import constant

if TYPE_CHECKING:
    import onnx_ir as ir

LARGEST = float(np.finfo(np.float16).max)
"""65504; beyond lies infinity."""

SMALLEST = float(np.finfo(np.float16).tiny)
"""6.1e-5; below, values lose bits, and below 6e-8 coremltools puts 6e-8 in silence."""

MASK = 3e4
"""What stands for −∞ in a mask: two of them can be added, and exp(−3e4) is 0 in every float type."""

COMPARING = frozenset({"Softmax", "LogSoftmax", "ReduceMax", "ReduceMin", "ArgMax", "ArgMin", "TopK", "MaxPool"})
"""Operators to which a very large number means nothing but its order."""

PASSING = frozenset(
    {
        *("Where", "Add", "Sub", "Mul", "Max", "Min", "Clip", "Cast", "Identity", "Concat", "Pad", "Trilu"),
        *("Expand", "Unsqueeze", "Squeeze", "Reshape", "Slice", "Transpose", "Gather", "Tile", "Split"),
    }
)
"""Operators that hand a mask on."""


@dataclass(frozen=True)
class _Place:
    node: ir.Node
    index: int
    array: NDArray[np.floating[Any]]


def safe_constants(graph: ir.Model) -> dict[tuple[str, int], NDArray[np.float32]]:
    """What to read in place of constants that float16 cannot hold, by (node, input).

    Masks become ±3e4, and the limits of a Clip 65504.

    Raises:
        InputError: Other constants are too large; all of them are named.
    """
    replaced, refused = {}, []
    for place in _too_large(graph):
        limit = LARGEST if place.node.op_type == "Clip" else MASK
        if place.node.op_type == "Clip" or _is_mask(place.node, set()):
            replaced[str(place.node.name), place.index] = np.asarray(np.clip(place.array, -limit, limit), np.float32)
        else:
            value = place.node.inputs[place.index]
            most = float(np.abs(place.array).max())
            refused.append(
                f"{place.node.name} ({place.node.op_type}) reads {value.name if value else ''!r} with {most:.3g}"
            )
    if refused:
        what = f"float16 ends at {LARGEST:.0f}, and this model holds larger constants: {'; '.join(refused)}."
        raise InputError(what, "Compute in float32 (coreml:fp32, or the option compute=float32), or scale the model.")
    return replaced


def _too_large(graph: ir.Model) -> Iterator[_Place]:
    for node in graph.graph:
        for index, value in enumerate(node.inputs):
            array = constant(value)
            if array is not None and array.dtype.kind == "f" and array.size and np.abs(array).max() > LARGEST:
                yield _Place(node, index, array)


def _is_mask(node: ir.Node, seen: set[int]) -> bool:
    """Whether all that a node computes ends in operators that only compare."""
    if node.op_type in COMPARING:
        return True
    if node.op_type not in PASSING or any(value.is_graph_output() for value in node.outputs):
        return False
    if id(node) in seen:
        return True
    seen.add(id(node))
    readers = [reader for value in node.outputs for reader in value.consumers()]
    return bool(readers) and all(_is_mask(reader, seen) for reader in readers)


def fits(operation: Any) -> bool:
    """Whether a MIL operation may compute in float16: not where a scale is below what float16 holds in full."""
    if _has_small_scale(operation):
        return False
    operands = [value for value in operation.inputs.values() if value is not None]
    producers = [each.op for value in operands for each in (value if isinstance(value, list | tuple) else (value,))]
    return not any(
        op is not None and op.op_type == "constexpr_affine_dequantize" and _has_small_scale(op) for op in producers
    )


def _has_small_scale(operation: Any) -> bool:
    if operation.op_type not in ("quantize", "dequantize", "constexpr_affine_dequantize"):
        return False
    return bool(np.min(operation.scale.val) < SMALLEST)
