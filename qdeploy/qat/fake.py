"""Fake quantization in torch: the arithmetic of `qdeploy.affine` with gradients, and the ranges that it follows.

    q = clip(round(x / scale) + zero_point, qmin, qmax)        x̂ = scale · (q − zero_point)
    ∂x̂/∂x = 1 where round(x / scale) + zero_point lies in [qmin, qmax], else 0        (straight-through estimator)

Sources: Bengio et al. 2013 (arXiv 1308.3432) and Jacob et al. 2018 (arXiv 1712.05877, section 3) for the estimator;
Sakr et al. 2022 (arXiv 2206.06501, section 3) for the clipping of weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.affine import SMALLEST_SCALE, IntegerType
from qdeploy.scheme import PerChannel, Scheme

MOMENTUM = 0.1
"""How far a range moves towards each batch's extremes; BatchNorm's running statistics move as fast."""

CLIPPING_STEPS = 20
"""Of the iteration for a weight's clipping; ten suffice for eight bits and bell-shaped weights."""


class _Rounded(torch.autograd.Function):
    """x̂ of x, whose gradient passes straight through where x is not cut off."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, zero_point: Tensor, integer: IntegerType) -> tuple[Tensor, Tensor]:
        steps = torch.round(x / scale) + zero_point
        passes = (steps >= integer.qmin) & (steps <= integer.qmax)
        return (steps.clamp(integer.qmin, integer.qmax) - zero_point) * scale, passes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG004 - torch calls it so
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (passes,) = ctx.saved_tensors
        return gradient * passes, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, integer: IntegerType) -> Tensor:
    """A tensor as it comes back from quantization; float32, scale and zero point broadcast against it."""
    rounded: Tensor = _Rounded.apply(x, scale, zero_point, integer)[0]
    return rounded


def affine_from_limits(minimum: Tensor, maximum: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point as float32, as `qdeploy.affine.affine_from_limits` has them."""
    low, high = minimum.double().clamp(max=0.0), maximum.double().clamp(min=0.0)
    integer = scheme.integer
    if scheme.symmetric:
        middle = 0 if integer.signed else (integer.qmax + 1) // 2
        scale = _usable_scale(torch.maximum(-low, high) / (integer.qmax - middle))
        return scale, torch.full_like(scale, middle)
    scale = _usable_scale((high - low) / (integer.qmax - integer.qmin))
    zero_point = torch.round(integer.qmin - low / scale.double()).clamp(integer.qmin, integer.qmax)
    return scale, zero_point.float()


def _usable_scale(exact: Tensor) -> Tensor:
    return torch.where(exact == 0.0, 1.0, exact.clamp(min=SMALLEST_SCALE)).float()


def clipping(magnitudes: Tensor, qmax: int) -> Tensor:
    """The threshold t at which symmetric quantization has the least square error, of each row.

    Of n values the n₀ below t are rounded in steps of t/qmax, and the others cut off:

        error(t) = n₀·t²/(12·qmax²) + Σ (|w| − t)²        so        t = Σ |w| / (n₀/(12·qmax²) + n − n₀)

    where the sums are over |w| ≥ t. Iterated from the mean magnitude.

    Args:
        magnitudes: |w|, float32 [rows, values].
        qmax: Largest integer.
    """
    noise = 1 / (12 * qmax**2)
    peak = magnitudes.amax(dim=1, keepdim=True)
    threshold = magnitudes.mean(dim=1, keepdim=True)
    for _ in range(CLIPPING_STEPS):
        cut = magnitudes >= threshold
        count = cut.sum(dim=1, keepdim=True)
        total = (magnitudes * cut).sum(dim=1, keepdim=True)
        threshold = torch.minimum(total / (noise * (magnitudes.shape[1] - count) + count), peak)
    return threshold.squeeze(1)


class Activation(nn.Module):
    """A place where a computed tensor may be quantized: its range, and while in use its scheme.

    Attributes:
        scheme: None as long as the tensor is to stay float.
        origin: The place that the values were moved from, if they keep its range; alone in a tuple, as that place is
            no part of this one.
        frozen: Whether the range stays as it is in training, too.
        minimum: Lower limit of the range; +∞ before the first batch.
        maximum: Upper limit of the range.
    """

    minimum: Tensor
    maximum: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scheme: Scheme | None = None
        self.origin: tuple[Activation, ...] = ()
        self.frozen = False
        self.register_buffer("minimum", torch.tensor(float("inf")))
        self.register_buffer("maximum", torch.tensor(float("-inf")))

    def forward(self, x: Any) -> Any:
        """The tensor after quantization, once it has a range; in training the range follows it first."""
        if self.origin:
            return self.origin[0].rounded(x)
        if self.scheme is None:
            return x
        if self.training and not self.frozen:
            self._follow(x.detach())
        return self.rounded(x)

    def rounded(self, x: Tensor) -> Tensor:
        """The tensor after quantization with the range as it is."""
        assert self.scheme is not None
        scale, zero_point = affine_from_limits(self.minimum, self.maximum, self.scheme)
        rounded = fake_quantize(x.float(), scale, zero_point, self.scheme.integer).to(x.dtype)
        return torch.where(torch.isfinite(self.minimum), rounded, x)

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        for limit, extreme in ((self.minimum, x.amin()), (self.maximum, x.amax())):
            moved = limit + MOMENTUM * (extreme.float() - limit)
            limit.copy_(torch.where(torch.isfinite(limit), moved, extreme.float()))


class Constant(nn.Module):
    """A place where a weight may be quantized, behind what is folded into it.

    Its range follows from its values: the extremes, or the clipping of least error where the scheme is symmetric.

    Attributes:
        scheme: None as long as the weight is to stay float.
        axis: Of its channels.
    """

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.scheme: Scheme | None = None
        self.axis = axis

    def forward(self, weight: Tensor, factor: Tensor | None = None) -> Tensor:
        """The weight, times one factor a channel, after quantization."""
        folded = times(weight, factor, self.axis)
        if self.scheme is None:
            return folded
        scale, zero_point = self.affine(folded)
        return fake_quantize(folded, scale, zero_point, self.scheme.integer)

    @torch.no_grad()
    def affine(self, folded: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, shaped to broadcast against the weight."""
        assert self.scheme is not None
        per_channel = isinstance(self.scheme.granularity, PerChannel)
        rows = folded.transpose(0, self.axis).flatten(1) if per_channel else folded.reshape(1, -1)
        if self.scheme.symmetric:
            highest = clipping(rows.float().abs(), self.scheme.integer.qmax)
            lowest = -highest
        else:
            lowest, highest = rows.float().aminmax(dim=1)
        scale, zero_point = affine_from_limits(lowest, highest, self.scheme)
        if not per_channel:
            return scale.squeeze(0), zero_point.squeeze(0)
        return along(scale, self.axis, folded.ndim), along(zero_point, self.axis, folded.ndim)


def times(weight: Tensor, factor: Tensor | None, axis: int) -> Tensor:
    """A weight times one factor a channel."""
    return weight if factor is None else weight * along(factor, axis, weight.ndim)


def along(values: Tensor, axis: int, ndim: int) -> Tensor:
    """One value a channel, shaped to broadcast against a tensor of `ndim` axes."""
    return values.reshape([-1 if i == axis % ndim else 1 for i in range(ndim)])


def normalization_factor(variance: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """γ/σ: what BatchNorm's running statistics multiply each channel by."""
    factor = torch.rsqrt(variance + epsilon)
    return (factor if weight is None else factor * weight).detach()


def without_factor(x: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """A layer's output as it was before the factor was folded into its weight; channels lie along axis 1."""
    divided = x / along(torch.where(factor == 0, 1, factor), 1, x.ndim).to(x.dtype)
    return divided if bias is None else divided + along(bias, 1, x.ndim).to(x.dtype)
