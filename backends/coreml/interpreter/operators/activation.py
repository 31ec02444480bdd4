"""Activation functions. Arguments of one value a channel lie along dimension 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nn

from qdeploy.backends.coreml.interpreter.operators.choice import choose
from qdeploy.backends.coreml.interpreter.operators.elementwise import unary


def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Min(beta, x) where x ≥ 0, else min(beta, alpha·x)."""
    return torch.where(x >= 0, x, alpha * x).clamp(max=beta)


def elu(x: Tensor, alpha: float) -> Tensor:
    """Keeps x where x > 0, else alpha·(exp(x) − 1)."""
    return torch.where(x > 0, x, alpha * torch.expm1(x))


def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    """x·Φ(x), exactly or by one of two approximations."""
    modes: dict[str, Callable[[Tensor], Tensor]] = {
        "EXACT": nn.gelu,
        "TANH_APPROXIMATION": lambda v: nn.gelu(v, approximate="tanh"),
        "SIGMOID_APPROXIMATION": lambda v: v * torch.sigmoid(1.702 * v),
    }
    return choose(modes, "gelu", mode=mode)(x)


def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    """Keeps x where x ≥ 0, else alpha·x."""
    return torch.where(x >= 0, x, alpha * x)


def linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha·x + beta."""
    return alpha * x + beta


def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    """Keeps x where x > 0, else alpha·x, with one alpha a channel."""
    return torch.where(x > 0, x, channels(alpha, x) * x)


def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha·tanh(beta·x)."""
    return alpha * torch.tanh(beta * x)


def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha·x + beta, kept between 0 and 1."""
    return (alpha * x + beta).clamp(0, 1)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x))."""
    return torch.logaddexp(x, torch.zeros_like(x))


def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """alpha·log(1 + exp(beta·x)), with one alpha and beta a channel."""
    return channels(alpha, x) * softplus(channels(beta, x) * x)


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """exp(x) over its sum along an axis."""
    return torch.softmax(x, axis)


def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    """Keeps x where x ≥ alpha, else 0."""
    return torch.where(x >= alpha, x, 0)


def channels(vector: Tensor, x: Tensor) -> Tensor:
    """One value a channel, shaped so that it broadcasts against x along dimension 1."""
    return vector.reshape(-1, *[1] * (x.ndim - 2))


OPERATORS: dict[str, Callable[..., Any]] = {
    "clamped_relu": clamped_relu,
    "elu": elu,
    "gelu": gelu,
    "leaky_relu": leaky_relu,
    "linear_activation": linear_activation,
    "prelu": prelu,
    "relu": unary(torch.relu),
    "relu6": unary(nn.relu6),
    "scaled_tanh": scaled_tanh,
    "sigmoid": unary(torch.sigmoid),
    "sigmoid_hard": sigmoid_hard,
    "silu": unary(nn.silu),
    "softplus": softplus,
    "softplus_parametric": softplus_parametric,
    "softmax": softmax,
    "softsign": unary(nn.softsign),
    "thresholded_relu": thresholded_relu,
}
