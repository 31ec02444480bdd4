"""Element-wise arithmetic, comparisons and logic, with numpy's broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qdeploy.backends.coreml.interpreter.operators.arguments import Number
from qdeploy.backends.coreml.interpreter.operators.carriers import CARRIERS
from qdeploy.errors import UnavailableError


def unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """An operator of one argument."""

    def operator(x: Tensor) -> Tensor:
        return function(x)

    return operator


def binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """An operator of two arguments."""

    def operator(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    return operator


def real_div(x: Tensor, y: Tensor) -> Tensor:
    """Quotients of floats; how those of integers are rounded is not documented."""
    if not (x.is_floating_point() and y.is_floating_point()):
        raise UnavailableError("The interpreter has no real_div of integers.", "Cast its operands to fp32.")
    return x / y


def cast(x: Tensor, dtype: str) -> Tensor:
    """Another element type; floats lose their fraction on the way to integers."""
    return x != 0 if dtype == "bool" else x.to(CARRIERS[dtype])


def clip(x: Tensor, alpha: Number, beta: Number) -> Tensor:
    """Min(max(x, alpha), beta)."""
    return x.clamp(alpha, beta)


def threshold(x: Tensor, alpha: float) -> Tensor:
    """Max(x, alpha)."""
    return x.clamp(min=alpha)


def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    """1 / (x + epsilon)."""
    return 1 / (x + epsilon)


def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    """The natural logarithm of x + epsilon."""
    return torch.log(x + epsilon)


def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    """1 / sqrt(x + epsilon)."""
    return 1 / torch.sqrt(x + epsilon)


def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Takes a where cond holds, else b."""
    return torch.where(cond, a, b)


def floor_div(x: Tensor, y: Tensor) -> Tensor:
    """The quotient, rounded down."""
    return torch.div(x, y, rounding_mode="floor")


OPERATORS: dict[str, Callable[..., Any]] = {
    **{name: unary(getattr(torch, name)) for name in ("abs", "acos", "asin", "atan", "atanh", "ceil", "cos", "cosh")},
    **{name: unary(getattr(torch, name)) for name in ("erf", "exp", "exp2", "floor", "round", "sign", "sin", "sinh")},
    **{name: unary(getattr(torch, name)) for name in ("sqrt", "square", "tan", "tanh", "logical_not")},
    **{name: binary(getattr(torch, name)) for name in ("add", "sub", "mul", "maximum", "minimum", "pow", "less")},
    **{name: binary(getattr(torch, name)) for name in ("greater", "greater_equal", "less_equal", "not_equal")},
    **{name: binary(getattr(torch, name)) for name in ("logical_and", "logical_or", "logical_xor")},
    "equal": binary(torch.eq),
    "mod": binary(torch.remainder),  # as Python's %, with the sign of the divisor
    "real_div": real_div,
    "floor_div": floor_div,
    "cast": cast,
    "clip": clip,
    "threshold": threshold,
    "inverse": inverse,
    "log": log,
    "rsqrt": rsqrt,
    "select": select,
}
