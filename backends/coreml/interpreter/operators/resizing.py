"""Resizing of the last dimensions. The grids are those of the documentation of resize_bilinear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qdeploy.backends.coreml.interpreter.operators.arguments import Ints
from qdeploy.backends.coreml.interpreter.operators.choice import choose
from qdeploy.errors import UnavailableError

Grid = Callable[[Tensor, int, int], Tensor]
"""Places in the output, its size and the input's → where they lie in the input."""


def _align(i: Tensor, given: int, wanted: int) -> Tensor:
    return i * ((given - 1) / max(wanted - 1, 1))


def _align_centered(i: Tensor, given: int, wanted: int) -> Tensor:
    return _align(i, given, wanted) if wanted > 1 else torch.full_like(i, (given - 1) / 2)


def _default(i: Tensor, given: int, wanted: int) -> Tensor:
    return i * (given / wanted)


def _offset(i: Tensor, given: int, wanted: int) -> Tensor:
    return (i + 0.5) * (max(1, given - 1) / wanted)


def _unalign(i: Tensor, given: int, wanted: int) -> Tensor:
    return (i + 0.5) * (given / wanted) - 0.5


_GRIDS: dict[str, Grid] = {
    "STRICT_ALIGN_CORNERS": _align,
    "ALIGN_CORNERS": _align_centered,
    "DEFAULT": _default,
    "OFFSET_CORNERS": _offset,
    "UNALIGN_CORNERS": _unalign,
}


def _linear(x: Tensor, sizes: Ints, grid: Grid) -> Tensor:
    """The last dimensions interpolated linearly, each in turn."""
    for axis, wanted in enumerate(sizes, x.ndim - len(sizes)):
        given = x.shape[axis]
        points = grid(torch.arange(wanted, dtype=torch.float64), given, wanted).clamp(0, given - 1)
        low = points.floor().long()
        weight = (points - low).float().reshape(-1, *[1] * (x.ndim - axis - 1))
        x = x.index_select(axis, low) * (1 - weight) + x.index_select(axis, (low + 1).clamp(max=given - 1)) * weight
    return x


def _nearest(x: Tensor, sizes: Ints) -> Tensor:
    """The last dimensions by the element at floor(i · given / wanted)."""
    for axis, wanted in enumerate(sizes, x.ndim - len(sizes)):
        x = x.index_select(axis, torch.arange(wanted) * x.shape[axis] // wanted)
    return x


def resize(
    x: Tensor,
    shape: Ints,
    resized_dims: int,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    """The last `resized_dims` dimensions to the last sizes of `shape`; 0 keeps one.

    To the nearest element only with DEFAULT sampling: how the others round is not documented.
    """
    wanted = shape[len(shape) - resized_dims :]
    sizes = tuple(size or given for size, given in zip(wanted, x.shape[x.ndim - resized_dims :], strict=True))
    if choose({"LINEAR": False, "NEAREST_NEIGHBOR": True}, "resize", interpolation_mode=interpolation_mode):
        choose({"DEFAULT": _default}, "resize to the nearest neighbor", sampling_mode=sampling_mode)
        return _nearest(x, sizes)
    return _linear(x, sizes, choose(_GRIDS, "resize", sampling_mode=sampling_mode))


def resize_bilinear(
    x: Tensor, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> Tensor:
    """Height and width to a size, interpolated."""
    grid = choose(_GRIDS, "resize_bilinear", sampling_mode=sampling_mode)
    return _linear(x, (target_size_height, target_size_width), grid)


def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    """Height and width to a size, by the nearest element."""
    return _nearest(x, (target_size_height, target_size_width))


def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1,
    scale_factor_width: float = 1,
    *,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """Height and width times a factor, rounded down; the grid follows from the sizes, not from the factors."""
    half = not align_corners if half_pixel_centers is None else half_pixel_centers
    if align_corners and half:
        raise UnavailableError("The interpreter has no upsample_bilinear that aligns corners and centers of pixels.")
    grid = _align if align_corners else _unalign if half else _default
    return _linear(x, _scaled(x, scale_factor_height, scale_factor_width), grid)


def upsample_nearest_neighbor(x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1) -> Tensor:
    """Height and width times a factor, by the nearest element.

    Raises:
        UnavailableError: A factor does not give a whole size: which elements are then taken is not documented.
    """
    sizes = _scaled(x, scale_factor_height, scale_factor_width)
    if sizes != (x.shape[-2] * scale_factor_height, x.shape[-1] * scale_factor_width):
        what = f"The interpreter has no upsample_nearest_neighbor of {list(x.shape[-2:])} elements"
        cure = "Resize to a size instead."
        raise UnavailableError(f"{what} by {scale_factor_height} and {scale_factor_width}.", cure)
    return _nearest(x, sizes)


def _scaled(x: Tensor, height: float, width: float) -> Ints:
    return int(x.shape[-2] * height), int(x.shape[-1] * width)


def crop(x: Tensor, crop_height: Ints, crop_width: Ints) -> Tensor:
    """Drops some rows at the top and the bottom, and columns at the left and the right."""
    (top, bottom), (left, right) = crop_height, crop_width
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


OPERATORS: dict[str, Callable[..., Any]] = {
    "resize": resize,
    "resize_bilinear": resize_bilinear,
    "resize_nearest_neighbor": resize_nearest_neighbor,
    "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
    "crop": crop,
}
