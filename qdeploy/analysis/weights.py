"""The weights of a model: how far the ranges of their channels differ, their outliers, and one scale or many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.affine import IntegerType, affine_from_tensor, fake_quantize, sqnr_db
from qdeploy.analysis.causes import channel_peaks
from qdeploy.model import FloatModel
from qdeploy.plan import quantizable
from qdeploy.scheme import PerTensor, QuantContract, Scheme

if TYPE_CHECKING:
    import onnx_ir as ir

SEVERAL_SCALES = 2.0
"""Channel ranges that differ by more want a scale each: one scale would leave the smallest channel half the levels."""

OUTLIER = 6.0
"""In rms. Of normally distributed weights two in a billion lie beyond."""

WEIGHT = IntegerType(8, signed=True, narrow=True)
"""What the two granularities are compared in: int8 whatever the target takes."""


@dataclass(frozen=True)
class WeightReport:
    """One weight. A channel's range is its largest magnitude.

    Attributes:
        node: The operator that reads it.
        op_type: Its ONNX operator.
        weight: The initializer's name.
        shape: As stored.
        channels: Output channels.
        channel_ratio: The largest channel's range over the smallest's; channels of zeros are left out.
        outliers: Values beyond six times the rms of their channel.
        peak_to_rms: The largest magnitude over the rms of the whole weight.
        per_tensor_db: SQNR in dB as int8 with one scale, the mean noise of channels each of energy 1: a small channel
            counts like a large one.
        per_channel_db: Likewise with a scale for each channel.
        scheme: How the target stores it; None if it stays float.
        recommended: "per-tensor" or "per-channel".
        advice: What to do where the target's scheme is not what is recommended; else empty.
    """

    node: str
    op_type: str
    weight: str
    shape: tuple[int, ...]
    channels: int
    channel_ratio: float
    outliers: int
    peak_to_rms: float
    per_tensor_db: float
    per_channel_db: float
    scheme: str | None
    recommended: str
    advice: str


def weight_reports(model: FloatModel, contract: QuantContract, keep: Sequence[str] = ()) -> tuple[WeightReport, ...]:
    """Every Conv, ConvTranspose, Gemm and MatMul with a constant weight, in graph order.

    Args:
        model: A prepared model.
        contract: The target's rules, which say how each weight is stored.
        keep: Nodes that stay float.

    Raises:
        InputError: A keep pattern matches nothing.
    """
    graph = questions.load_graph(model.path)
    schemes = {str(node.name): rule.inputs.get(1) for node, rule in quantizable(graph, contract, keep)}
    nodes = [(node, weight) for node in graph.graph if (weight := questions.weight_of(node)) is not None]
    return tuple(_report(node, weight, schemes.get(str(node.name))) for node, weight in nodes if weight.size)


def _report(node: ir.Node, weight: NDArray[np.float32], scheme: Scheme | None) -> WeightReport:
    axis = questions.weight_channel_axis(node) % weight.ndim
    peaks = channel_peaks(weight, axis)
    used = peaks[peaks > 0]
    ratio = float(used.max() / used.min()) if used.size else 1.0
    rms = float(np.sqrt(np.mean(np.square(weight, dtype=np.float64))))
    recommended = "per-channel" if ratio > SEVERAL_SCALES else "per-tensor"
    return WeightReport(
        str(node.name),
        node.op_type,
        questions.name_of(node.inputs[1]),
        weight.shape,
        weight.shape[axis],
        ratio,
        _outliers(weight, axis),
        float(peaks.max()) / rms if rms else 1.0,
        _int8_db(weight, axis, None),
        _int8_db(weight, axis, axis),
        None if scheme is None else str(scheme),
        recommended,
        _advice(recommended, scheme),
    )


def _outliers(weight: NDArray[np.float32], axis: int) -> int:
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float64)
    rms = np.sqrt(np.mean(np.square(rows), axis=1, keepdims=True))
    return int(np.count_nonzero(np.abs(rows) > OUTLIER * rms))


def _int8_db(weight: NDArray[np.float32], axis: int, scale_axis: int | None) -> float:
    """SQNR of the weight as int8, all channels scaled to the same energy."""
    rounded = fake_quantize(weight, affine_from_tensor(weight, WEIGHT, symmetric=True, axis=scale_axis))
    exact, rounded = (np.moveaxis(each, axis, 0).reshape(weight.shape[axis], -1) for each in (weight, rounded))
    energy = np.sqrt(np.sum(np.square(exact, dtype=np.float64), axis=1, keepdims=True))
    used = energy[:, 0] > 0
    return sqnr_db(exact[used] / energy[used], rounded[used] / energy[used])


def _advice(recommended: str, scheme: Scheme | None) -> str:
    if recommended == "per-channel" and scheme is not None and isinstance(scheme.granularity, PerTensor):
        return "--granularity per-channel, or --recover equalization where the target has one scale a tensor"
    return ""
