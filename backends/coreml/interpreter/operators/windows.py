"""Pooling, and the padding of windows that slide over spatial dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nn

from qdeploy.backends.coreml.interpreter.operators.arguments import Ints
from qdeploy.backends.coreml.interpreter.operators.choice import choose

_MAX_POOL = {3: nn.max_pool1d, 4: nn.max_pool2d, 5: nn.max_pool3d}
_AVG_POOL = {3: nn.avg_pool1d, 4: nn.avg_pool2d, 5: nn.avg_pool3d}

Padding = tuple[tuple[int, int], ...]


def paddings(
    operator: str, pad_type: str, pad: Ints | None, sizes: Sequence[int], windows: Ints, strides: Ints
) -> Padding:
    """Elements before and after each spatial dimension.

    With same, the output has ceil(size / stride) elements, and an odd one of the padding that this takes stands after;
    with same_lower before. (The documentation of conv also has a formula without the stride, which contradicts both.)
    """
    totals = [
        max((math.ceil(size / stride) - 1) * stride + window - size, 0)
        for size, window, stride in zip(sizes, windows, strides, strict=True)
    ]
    given = pad or (0,) * (2 * len(totals))
    ways: dict[str, Padding] = {
        "valid": ((0, 0),) * len(totals),
        "custom": tuple(zip(given[::2], given[1::2], strict=True)),
        "same": tuple((total // 2, total - total // 2) for total in totals),
        "same_lower": tuple((total - total // 2, total // 2) for total in totals),
    }
    return choose(ways, operator, pad_type=pad_type)


def two_sided(before_after: Iterable[tuple[int, int]]) -> list[int]:
    """Padding as torch takes it: flat, the last dimension first."""
    return [width for pair in reversed(list(before_after)) for width in pair]


def _extensions(sizes: Sequence[int], padding: Padding, windows: Ints, strides: Ints, *, ceil_mode: bool) -> Padding:
    """What ceil_mode adds after the padding, so that the last window is whole.

    Outputs are ceil((size + padding − window) / stride) + 1, less one if there is padding and the last window would
    begin beyond the input and the padding before it.
    """
    if not ceil_mode:
        return ((0, 0),) * len(padding)
    extensions = []
    for size, (before, after), window, stride in zip(sizes, padding, windows, strides, strict=True):
        outputs = math.ceil((size + before + after - window) / stride) + 1
        if (outputs - 1) * stride >= size + before and before + after > 0:
            outputs -= 1
        extensions.append((0, max((outputs - 1) * stride + window - size - before - after, 0)))
    return tuple(extensions)


def max_pool(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: str,
    strides: Ints | None = None,
    pad: Ints | None = None,
    *,
    ceil_mode: bool = False,
) -> Tensor:
    """The maximum of each window; padding never wins."""
    strides = strides or (1,) * len(kernel_sizes)
    padding = paddings("max_pool", pad_type, pad, x.shape[2:], kernel_sizes, strides)
    beyond = _extensions(x.shape[2:], padding, kernel_sizes, strides, ceil_mode=ceil_mode)
    padded = nn.pad(x, two_sided((b, a + c) for (b, a), (_, c) in zip(padding, beyond, strict=True)), value=-torch.inf)
    return _MAX_POOL[x.ndim](padded, kernel_sizes, strides)


def avg_pool(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: str,
    strides: Ints | None = None,
    pad: Ints | None = None,
    *,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    """The mean of each window; padding counts unless it is excluded, what ceil_mode adds beyond it never does."""
    strides = strides or (1,) * len(kernel_sizes)
    padding = paddings("avg_pool", pad_type, pad, x.shape[2:], kernel_sizes, strides)
    beyond = _extensions(x.shape[2:], padding, kernel_sizes, strides, ceil_mode=ceil_mode)
    pool = _AVG_POOL[x.ndim]
    means = pool(nn.pad(nn.pad(x, two_sided(padding)), two_sided(beyond)), kernel_sizes, strides)
    counted = torch.ones_like(x[:1, :1])
    counted = nn.pad(counted, two_sided(padding), value=0.0 if exclude_padding_from_average else 1.0)
    return means / pool(nn.pad(counted, two_sided(beyond)), kernel_sizes, strides)


OPERATORS: dict[str, Callable[..., Any]] = {"max_pool": max_pool, "avg_pool": avg_pool}
