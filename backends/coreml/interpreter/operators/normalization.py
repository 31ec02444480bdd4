"""Normalization. Variances divide by the number of elements."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nn

from qdeploy.backends.coreml.interpreter.operators.activation import channels
from qdeploy.backends.coreml.interpreter.operators.arguments import Ints


def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """gamma·(x − mean)/sqrt(variance + epsilon) + beta, a value of each a channel."""
    return nn.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


def instance_norm(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    """Each channel of each sample to mean 0 and variance 1, then gamma and beta a channel."""
    normal = _normal(x, tuple(range(2, x.ndim)), epsilon)
    normal = normal if gamma is None else normal * channels(gamma, x)
    return normal if beta is None else normal + channels(beta, x)


def layer_norm(
    x: Tensor,
    axes: Ints | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """To mean 0 and variance 1 over some dimensions, then gamma and beta of their shape."""
    dims = tuple(sorted(axis % x.ndim for axis in axes)) if axes is not None else tuple(range(x.ndim))
    shape = [size if axis in dims else 1 for axis, size in enumerate(x.shape)]
    normal = _normal(x, dims, epsilon)
    normal = normal if gamma is None else normal * gamma.reshape(shape)
    return normal if beta is None else normal + beta.reshape(shape)


def _normal(x: Tensor, dims: Ints, epsilon: float) -> Tensor:
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(variance + epsilon)


def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Scales x by the inverse root of epsilon plus the sum of squares of its last three dimensions."""
    return x / torch.sqrt((x * x).sum((-3, -2, -1), keepdim=True) + epsilon)


def local_response_norm(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """Gives x / (k + alpha/size · Σ x²)^beta over `size` channels around; an even number has one more before."""
    squares = (x * x).movedim(1, -1)
    windows = nn.pad(squares, (size // 2, math.ceil(size / 2) - 1)).unfold(-1, size, 1)
    return x / (k + alpha / size * windows.sum(-1).movedim(-1, 1)) ** beta


OPERATORS: dict[str, Callable[..., Any]] = {
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "layer_norm": layer_norm,
    "l2_norm": l2_norm,
    "local_response_norm": local_response_norm,
}
