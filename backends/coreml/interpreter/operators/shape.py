"""Operators that arrange elements anew, or make tensors out of shapes and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nn

from qdeploy.backends.coreml.interpreter.operators.arguments import Bools, Ints, Number, Tensors
from qdeploy.backends.coreml.interpreter.operators.choice import choose
from qdeploy.backends.coreml.interpreter.operators.windows import two_sided


def identity(x: Any) -> Any:
    """Hands x on."""
    return x


def shape(x: Tensor) -> Tensor:
    """The sizes of x's dimensions."""
    return torch.tensor(x.shape, dtype=torch.int32)


def reshape(x: Tensor, shape: Ints) -> Tensor:
    """Gives x with another shape: −1 takes the rest, 0 keeps the size as far from the end (1 beyond x's rank)."""
    sizes = (1,) * len(shape) + tuple(x.shape)
    kept = sizes[len(sizes) - len(shape) :]
    return x.reshape([size if wanted == 0 else wanted for wanted, size in zip(shape, kept, strict=True)])


def reshape_like(x: Tensor, ref_tensors: Tensors, begins: Ints, ends: Ints, end_masks: Bools) -> Tensor:
    """Gives x with a shape put together from slices of the shapes of others."""
    slices = zip(ref_tensors, begins, ends, end_masks, strict=True)
    return x.reshape([size for each, b, e, rest in slices for size in each.shape[b : None if rest else e]])


def expand_dims(x: Tensor, axes: Ints) -> Tensor:
    """Gives x with dimensions of size 1, which stand at `axes` of the result."""
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    """Gives x without the dimensions of size 1, or those of them at `axes`."""
    return x.squeeze() if axes is None else x.squeeze(axes)


def transpose(x: Tensor, perm: Ints) -> Tensor:
    """Gives x with its dimensions in another order."""
    return x.permute(perm)


def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    """Makes a matrix: the dimensions before an axis, and those from it on."""
    rows = math.prod(x.shape[:axis])
    return x.reshape(rows, math.prod(x.shape[axis:]))


def concat(values: Tensors, axis: int, *, interleave: bool = False) -> Tensor:
    """Tensors one after the other along an axis, or element by element in turn."""
    if interleave:
        return torch.stack(values, axis % values[0].ndim + 1).flatten(axis % values[0].ndim, axis % values[0].ndim + 1)
    return torch.cat([each.reshape(1) if each.ndim == 0 else each for each in values], axis)


def stack(values: Tensors, axis: int) -> Tensor:
    """Tensors one after the other along a new axis."""
    return torch.stack(values, axis)


def split(x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Ints | None = None) -> tuple[Tensor, ...]:
    """Cuts x along an axis, into equal parts or into parts of given sizes."""
    parts: tuple[Tensor, ...] = x.split(split_sizes or x.shape[axis] // (num_splits or 1), axis)
    return parts


def tile(x: Tensor, reps: Ints) -> Tensor:
    """Repeats x along each dimension."""
    return x.repeat(reps)


def reverse(x: Tensor, axes: Ints | None = None) -> Tensor:
    """Turns x around along some axes, by default all."""
    return x.flip(tuple(range(x.ndim)) if axes is None else axes)


def pad(x: Tensor, pad: Ints, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """Gives x with elements before and after its last len(pad) / 2 dimensions."""
    widths = list(zip(pad[::2], pad[1::2], strict=True))
    way = choose({"constant": "constant", "reflect": "reflect", "replicate": "edge"}, "pad", mode=mode)
    if way == "constant":
        return nn.pad(x, two_sided(widths), value=constant_val)
    for axis, (before, after) in enumerate(widths, x.ndim - len(widths)):
        places = np.pad(np.arange(x.shape[axis]), (before, after), way)  # type: ignore[call-overload]
        x = x.index_select(axis, torch.from_numpy(places))
    return x


def fill(shape: Ints, value: Number = 0.0) -> Tensor:
    """A tensor of one value."""
    return torch.full(shape, value)


def fill_like(ref_tensor: Tensor, value: Number = 0.0) -> Tensor:
    """A tensor of one value, with the shape of another."""
    return torch.full(ref_tensor.shape, value)


def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    """start, start + step, … below the end."""
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """The last two dimensions without what lies beyond some diagonals; −1 keeps all on that side."""
    x = x if upper < 0 else x.tril(upper)
    return x if lower < 0 else x.triu(-lower)


def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    """Channels into space, as torch's: those of one output channel stand together."""
    return nn.pixel_shuffle(x, upscale_factor)


def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    """Space into channels: the inverse of pixel_shuffle."""
    return nn.pixel_unshuffle(x, downscale_factor)


def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """Channels into space, as TensorFlow's: those of one place in the block stand together."""
    n, channels, height, width = x.shape
    b = block_size
    blocks = x.reshape(n, b, b, channels // b**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(n, channels // b**2, height * b, width * b)


def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    """Space into channels: the inverse of depth_to_space."""
    n, channels, height, width = x.shape
    b = block_size
    blocks = x.reshape(n, channels, height // b, b, width // b, b).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(n, channels * b**2, height // b, width // b)


def sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    """All windows along an axis, which lie along a new one behind it."""
    return x.unfold(axis, size, stride).movedim(-1, axis % x.ndim + 1)


OPERATORS: dict[str, Callable[..., Any]] = {
    "identity": identity,
    "shape": shape,
    "reshape": reshape,
    "reshape_like": reshape_like,
    "expand_dims": expand_dims,
    "squeeze": squeeze,
    "transpose": transpose,
    "flatten2d": flatten2d,
    "concat": concat,
    "stack": stack,
    "split": split,
    "tile": tile,
    "reverse": reverse,
    "pad": pad,
    "fill": fill,
    "fill_like": fill_like,
    "range_1d": range_1d,
    "band_part": band_part,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "depth_to_space": depth_to_space,
    "space_to_depth": space_to_depth,
    "sliding_windows": sliding_windows,
}
