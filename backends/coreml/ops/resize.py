"""Resize: MIL's operations where their grid is ONNX's, products with interpolation matrices where sizes are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.backends.coreml.call import Call, Handler
from qdeploy.graph import constant

if TYPE_CHECKING:
    import onnx_ir as ir

SAMPLING = {
    "half_pixel": "UNALIGN_CORNERS",
    "pytorch_half_pixel": "UNALIGN_CORNERS",
    "align_corners": "STRICT_ALIGN_CORNERS",
    "asymmetric": "DEFAULT",
}
"""ONNX's coordinate_transformation_mode → the sampling_mode of MIL's resize that has the same grid."""


@dataclass(frozen=True)
class Form:
    """What a Resize node asks for, as far as the graph tells.

    Attributes:
        mode: nearest, linear or cubic.
        grid: coordinate_transformation_mode.
        rounding: nearest_mode.
        antialias: Whether a filter widens when sizes shrink.
        cubic: Coefficient of the cubic kernel.
        exclude_outside: Whether what lies outside gets no weight.
        before: Sizes of the input; None where dynamic.
        after: Sizes of the output; None where unknown.
        scales: The factors, where known.
    """

    mode: str
    grid: str
    rounding: str
    antialias: bool
    cubic: float
    exclude_outside: bool
    before: tuple[int | None, ...]
    after: tuple[int | None, ...]
    scales: tuple[float | None, ...]

    @property
    def resized(self) -> list[int]:
        """The axes whose size changes, or may."""
        return [axis for axis, scale in enumerate(self.scales) if scale != 1.0]


def form_of(node: ir.Node) -> Form:
    """Read a node."""
    attributes = node.attributes
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    before = tuple(dim if isinstance(dim, int) else None for dim in shape) if shape is not None else ()
    axes = [axis % len(before) for axis in attributes.get_ints("axes", range(len(before)))]
    scales, sizes = (constant(node.inputs[i]) if len(node.inputs) > i else None for i in (2, 3))
    factors: list[float | None] = [1.0] * len(before)
    after: list[int | None] = list(before)
    for place, axis in enumerate(axes):
        size = before[axis]
        if scales is not None and scales.size:
            factors[axis] = float(scales[place])
            after[axis] = int(np.floor(size * float(scales[place]))) if size is not None else None
        elif sizes is not None and size is not None:
            after[axis], factors[axis] = int(sizes[place]), int(sizes[place]) / size
        else:
            known = node.outputs[0].shape[axis] if node.outputs[0].shape is not None else None
            after[axis] = known if isinstance(known, int) else None
            factors[axis] = after[axis] / size if after[axis] is not None and size is not None else None
            if (
                size is None
                and shape is not None
                and node.outputs[0].shape is not None
                and shape[axis] == node.outputs[0].shape[axis]
            ):
                factors[axis] = 1.0
    return Form(
        attributes.get_string("mode", "nearest"),
        attributes.get_string("coordinate_transformation_mode", "half_pixel"),
        attributes.get_string("nearest_mode", "round_prefer_floor"),
        bool(attributes.get_int("antialias", 0)),
        attributes.get_float("cubic_coeff_a", -0.75),
        bool(attributes.get_int("exclude_outside", 0)),
        before,
        tuple(after),
        tuple(factors),
    )


def is_of_images(form: Form) -> bool:
    """Whether height and width alone change, and no filter is asked for that MIL does not have."""
    rank = len(form.before)
    return rank == 4 and set(form.resized) <= {2, 3} and not form.antialias and not form.exclude_outside


def integer_factors(form: Form) -> tuple[int, int] | None:
    """Height and width grow by these whole numbers."""
    factors = form.scales[-2:]
    whole = all(factor is not None and factor >= 1 and float(factor).is_integer() for factor in factors)
    return (int(factors[0] or 1), int(factors[1] or 1)) if whole else None


def upsampling(form: Form) -> str:
    """The MIL operation that grows height and width by whole numbers on ONNX's grid; empty if there is none."""
    factors = integer_factors(form)
    if not is_of_images(form) or factors is None:
        return ""
    if form.mode == "linear" and form.grid in ("half_pixel", "pytorch_half_pixel"):
        return "upsample_bilinear"
    floor = form.grid == "asymmetric" and (
        form.rounding == "floor" or (form.rounding == "round_prefer_floor" and max(factors) <= 2)
    )
    centred = form.grid in ("half_pixel", "pytorch_half_pixel") and form.rounding.startswith("round")
    return "upsample_nearest_neighbor" if form.mode == "nearest" and (floor or centred) else ""


def sampling(form: Form) -> str:
    """The sampling mode of MIL's resize that has ONNX's grid, from sizes alone; empty if there is none."""
    for before, after, scale in zip(form.before[2:], form.after[2:], form.scales[2:], strict=True):
        if scale is not None and (before is None or after is None or before * scale != after):
            return ""  # MIL recomputes the factor from the sizes
        if form.grid == "pytorch_half_pixel" and after == 1:
            return ""
    if not is_of_images(form):
        return ""
    if form.mode == "linear":
        return SAMPLING.get(form.grid, "")
    return "DEFAULT" if form.mode == "nearest" and form.grid == "asymmetric" and form.rounding == "floor" else ""


def resize(call: Call) -> Any:
    """By whole numbers, to sizes, or by matrices."""
    mb, form, x = call.mb, form_of(call.node), call.var(0)
    if operation := upsampling(form):
        height, width = integer_factors(form) or (1, 1)
        corners = {"align_corners": False} if operation == "upsample_bilinear" else {}
        kind = np.float32 if corners else np.int32
        sizes = {"scale_factor_height": kind(height), "scale_factor_width": kind(width)}
        return getattr(mb, operation)(x=x, **sizes, **corners)
    if mode := sampling(form):
        method = "LINEAR" if form.mode == "linear" else "NEAREST_NEIGHBOR"
        shape = _target(call, form)
        return mb.resize(x=x, shape=shape, resized_dims=np.uint32(2), interpolation_mode=method, sampling_mode=mode)
    for axis in form.resized:
        x = _by_matrix(mb, x, axis, interpolation(form, axis))
    return x


def _target(call: Call, form: Form) -> Any:
    after = form.after[-2:]
    if None not in after:
        return np.array(after, np.int32)
    sizes = call.var(3)  # of all axes, or of the last two
    count = call.shape(3)[0]
    return call.mb.slice_by_size(x=sizes, begin=np.array([count - 2], np.int32), size=np.array([2], np.int32))


def _by_matrix(mb: Any, x: Any, axis: int, matrix: NDArray[np.float32]) -> Any:
    """Multiply along one axis: it is made the last one, and put back."""
    rank = len(x.shape)
    order = [other for other in range(rank) if other != axis] + [axis]
    if axis == rank - 1:
        return mb.linear(x=x, weight=matrix)
    moved = mb.linear(x=mb.transpose(x=x, perm=np.array(order, np.int32)), weight=matrix)
    return mb.transpose(x=moved, perm=np.argsort(order).astype(np.int32))


def interpolation(form: Form, axis: int) -> NDArray[np.float32]:
    """The matrix [after, before] that interpolates along one axis (ONNX, Resize).

    Row by row: the kernel's values at the distances of the neighbours from where the output value lies in the input.
    What lies outside the input counts as the edge, or, with exclude_outside, not at all.
    """
    before, after, scale = form.before[axis], form.after[axis], form.scales[axis]
    assert before is not None
    assert after is not None
    assert scale is not None
    places = coordinates(form.grid, before, after, scale)
    if form.mode == "nearest":
        chosen = np.clip(ROUNDINGS[form.rounding](places), 0, before - 1).astype(int)
        nearest: NDArray[np.float32] = np.eye(before, dtype=np.float32)[chosen]
        return nearest
    width = min(scale, 1.0) if form.antialias else 1.0
    support = 1 if form.mode == "linear" else 2
    first = int(np.floor(-support / width)) + 1
    base = np.floor(places)
    taps = np.arange(first, 2 - first)
    neighbours = base[:, None] + taps
    distance = np.abs(neighbours - places[:, None]) * width
    weights = np.clip(1 - distance, 0, None) if form.mode == "linear" else cubic(distance, form.cubic)
    if form.exclude_outside:
        weights = np.where((neighbours < 0) | (neighbours >= before), 0, weights)
    weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((after, before))
    rows = np.broadcast_to(np.arange(after)[:, None], neighbours.shape)
    np.add.at(matrix, (rows, np.clip(neighbours, 0, before - 1).astype(int)), weights)
    return matrix.astype(np.float32)


ROUNDINGS: Mapping[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def coordinates(grid: str, before: int, after: int, scale: float) -> NDArray[np.float64]:
    """Where each output value lies in the input (ONNX, Resize, coordinate_transformation_mode)."""
    out = np.arange(after, dtype=np.float64)
    if grid == "align_corners":
        return out * (before - 1) / (before * scale - 1) if after > 1 else np.zeros(1)
    if grid == "asymmetric":
        return out / scale
    if grid == "pytorch_half_pixel" and after == 1:
        return np.zeros(1)
    centred = (out + 0.5) / scale - 0.5
    if grid == "half_pixel_symmetric":
        centred += before / 2 * (1 - after / (scale * before))
    return centred


def cubic(distance: NDArray[np.float64], a: float) -> NDArray[np.float64]:
    """The kernel of Keys, "Cubic convolution interpolation for digital image processing", 1981, equation 4."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


GRIDS = (*SAMPLING, "half_pixel_symmetric")


def objections(node: ir.Node) -> Iterator[str]:
    """What neither MIL's operations nor a matrix can do."""
    if node.inputs[0] is None or node.inputs[0].shape is None:
        yield "an input of unknown rank"
        return
    form = form_of(node)
    if form.grid not in GRIDS:
        yield f"coordinate_transformation_mode={form.grid}"
        return
    if node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        yield f"keep_aspect_ratio_policy={node.attributes.get_string('keep_aspect_ratio_policy', '')}"
        return
    if upsampling(form) or sampling(form):
        return
    if any(form.before[axis] is None or form.after[axis] is None for axis in form.resized):
        yield f"mode={form.mode}, coordinate_transformation_mode={form.grid} with dynamic sizes (give them fixed ones)"


HANDLERS = {
    "Resize": Handler(
        resize,
        (
            *("antialias", "axes", "coordinate_transformation_mode", "cubic_coeff_a", "exclude_outside"),
            *("keep_aspect_ratio_policy", "mode", "nearest_mode", "extrapolation_value"),
        ),
        (1, 2),
        objections,
    ),
}
