"""Uniform affine quantization, once for the whole project. numpy only; nothing here knows ONNX.

    q  = clip(round(x / scale) + zero_point, qmin, qmax)        (round half to even)
    x̂  = scale · (q − zero_point)

Sources: Jacob et al. 2018 (arXiv 1712.05877, section 2.1); Krishnamoorthi 2018 (arXiv 1806.08342, section 2);
the ONNX operators QuantizeLinear and DequantizeLinear, whose rounding and saturation these functions share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]

SMALLEST_SCALE = 2.0**-63
"""Integer kernels multiply two scales, and an int32 bias is divided by their product: it must be a normal float32."""


@dataclass(frozen=True)
class IntegerType:
    """The integers a tensor is stored in.

    Attributes:
        bits: Width, 2 to 16.
        signed: Two's complement if true, otherwise from zero.
        narrow: Leave out the most negative value, so that the grid is symmetric about zero (weights).
    """

    bits: int = 8
    signed: bool = True
    narrow: bool = False

    @property
    def qmin(self) -> int:
        """Smallest stored integer."""
        return -(1 << (self.bits - 1)) + int(self.narrow) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest stored integer."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type that holds it; 4-bit values are held one to a byte."""
        return np.dtype(f"{'' if self.signed else 'u'}int{8 if self.bits <= 8 else 16}")

    @property
    def stored_bits(self) -> int:
        """Width of the ONNX type that holds it: seven bits are stored in eight."""
        return next(width for width in (2, 4, 8, 16, 32, 64) if self.bits <= width)

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}"


@dataclass(frozen=True)
class Range:
    """The interval of real values that a tensor's integers must cover.

    Always contains zero, since padding and ReLU produce exact zeros: limits on one side of it are moved to it.
    """

    minimum: float
    maximum: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.minimum) and np.isfinite(self.maximum) and self.minimum <= self.maximum):
            message = f"not a range: [{self.minimum}, {self.maximum}]"
            raise ValueError(message)
        object.__setattr__(self, "minimum", min(float(self.minimum), 0.0))
        object.__setattr__(self, "maximum", max(float(self.maximum), 0.0))


@dataclass(frozen=True)
class Affine:
    """Scale and zero point: scalars for a whole tensor, vectors with one entry a channel, or one for each block.

    Attributes:
        scale: float32, positive and normal.
        zero_point: In the integer type's dtype; all zero when symmetric.
        integer: The integers it maps to.
        axis: The channel axis when `scale` is a vector, the axis along which blocks lie, else None.
        block: How many values along `axis` share a scale, the last block perhaps fewer; None without blocks. `scale`
            then has the tensor's shape but for that axis, along which it has one value for each block.
    """

    scale: NDArray[np.float32]
    zero_point: IntArray
    integer: IntegerType
    axis: int | None = None
    block: int | None = None


def affine_from_limits(
    minimum: FloatArray | float,
    maximum: FloatArray | float,
    integer: IntegerType,
    *,
    symmetric: bool,
    axis: int | None = None,
) -> Affine:
    """Scale and zero point that cover [minimum, maximum], elementwise over channels.

    Symmetric: scale = max(−min, max) / qmax, zero point 0 (for unsigned types, the middle of the grid).
    Asymmetric: scale = (max − min) / (qmax − qmin), zero_point = round(qmin − min / scale), clamped.
    A constant zero tensor gets scale 1.
    """
    low = np.minimum(np.asarray(minimum, np.float64), 0.0)
    high = np.maximum(np.asarray(maximum, np.float64), 0.0)
    if symmetric:
        middle = 0 if integer.signed else (integer.qmax + 1) // 2
        scale = _usable_scale(np.maximum(-low, high) / (integer.qmax - middle))
        zero_point = np.full(scale.shape, middle)
    else:
        scale = _usable_scale((high - low) / (integer.qmax - integer.qmin))
        zero_point = np.clip(np.rint(integer.qmin - low / scale), integer.qmin, integer.qmax)
    return Affine(np.asarray(scale), np.asarray(zero_point, integer.dtype), integer, axis)


def _usable_scale(exact: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.where(exact == 0.0, 1.0, np.maximum(exact, SMALLEST_SCALE)).astype(np.float32)


def affine_from_tensor(tensor: FloatArray, integer: IntegerType, *, symmetric: bool, axis: int | None = None) -> Affine:
    """Scale and zero point from a constant tensor's own minimum and maximum; per channel along `axis` if given."""
    others = None if axis is None else tuple(i for i in range(tensor.ndim) if i != axis % tensor.ndim)
    if tensor.size == 0:
        minimum = maximum = np.zeros(() if axis is None else tensor.shape[axis])
    else:
        minimum, maximum = np.asarray(tensor.min(axis=others)), np.asarray(tensor.max(axis=others))
    return affine_from_limits(minimum, maximum, integer, symmetric=symmetric, axis=axis)


def affine_in_blocks(tensor: FloatArray, integer: IntegerType, *, symmetric: bool, axis: int, block: int) -> Affine:
    """Scale and zero point of every `block` consecutive values along `axis`, from their own minimum and maximum."""
    starts = np.arange(0, tensor.shape[axis], block)
    minimum, maximum = (extreme.reduceat(tensor, starts, axis) for extreme in (np.minimum, np.maximum))
    each = affine_from_limits(minimum, maximum, integer, symmetric=symmetric, axis=axis)
    return replace(each, block=block)


def spread(affine: Affine, shape: tuple[int, ...]) -> tuple[NDArray[np.float32], IntArray]:
    """Scales and zero points so shaped that they broadcast against a tensor of this shape."""
    if affine.axis is None:
        return affine.scale, affine.zero_point
    axis = affine.axis % len(shape)
    if affine.block is not None:
        blocks = np.arange(shape[axis]) // affine.block
        return np.take(affine.scale, blocks, axis), np.take(affine.zero_point, blocks, axis)
    along = [-1 if i == axis else 1 for i in range(len(shape))]
    return affine.scale.reshape(along), affine.zero_point.reshape(along)


def quantize(x: FloatArray, affine: Affine) -> IntArray:
    """Stored integers of x, saturated, rounded half to even, computed in float32 as ONNX QuantizeLinear does."""
    scale, zero_point = spread(affine, x.shape)
    # The quotient is float32 as in the operator, and may be infinite: it is clipped. The sum is wider, so that a large
    # quotient stays exact until then.
    with np.errstate(over="ignore"):
        quotient = np.asarray(x, np.float32) / scale
    q = np.rint(quotient).astype(np.float64) + zero_point
    stored: IntArray = np.clip(q, affine.integer.qmin, affine.integer.qmax).astype(affine.integer.dtype)
    return stored


def dequantize(q: IntArray, affine: Affine) -> NDArray[np.float32]:
    """The real values that stored integers stand for."""
    scale, zero_point = spread(affine, q.shape)
    steps = (q.astype(np.int32) - zero_point.astype(np.int32)).astype(np.float32)
    real: NDArray[np.float32] = steps * scale
    return real


def fake_quantize(x: FloatArray, affine: Affine) -> NDArray[np.float32]:
    """The tensor as it comes back from quantization: dequantize(quantize(x))."""
    return dequantize(quantize(x, affine), affine)


def sqnr_db(reference: NDArray[Any], approximation: NDArray[Any]) -> float:
    """Signal-to-quantization-noise ratio in dB: 10·log10(Σx² / Σ(x − x̂)²).

    Infinite when the two are equal; −inf when the reference is zero and the approximation is not.
    """
    signal = float(np.sum(np.square(reference, dtype=np.float64)))
    noise = float(np.sum(np.square(reference.astype(np.float64) - approximation.astype(np.float64))))
    return sqnr_from_energies(signal, noise)


def sqnr_from_energies(signal: float, noise: float) -> float:
    """SQNR in dB from the two sums of squares, so that it can be accumulated over samples."""
    if noise == 0.0:
        return float("inf")
    if signal == 0.0 or noise == float("inf"):
        return float("-inf")
    return 10.0 * float(np.log10(signal / noise))


def theoretical_sqnr_db(bits: int, peak_to_rms: float) -> float:
    """6.02·bits + 4.77 − 20·log10(peak / rms): uniform noise of variance scale²/12 on a grid that spans ±peak.

    Theory to compare a measurement with, for a signal that uses the whole grid and is never clipped
    (Oppenheim & Schafer, Discrete-Time Signal Processing, section 4.8).
    """
    return 6.02 * bits + 4.77 - 20.0 * float(np.log10(peak_to_rms))
