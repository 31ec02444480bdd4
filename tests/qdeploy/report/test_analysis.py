"""Analyses in the terminal: every figure in its place, and what follows in sentences."""

import io
import math

from qdeploy.analysis.causes import Cause
from qdeploy.analysis.layers import LayerError, LayerErrors
from qdeploy.analysis.sensitivity import Effect, LayerSensitivity, Sensitivity
from qdeploy.analysis.weights import WeightReport
from qdeploy.report.analysis import show


def shown(found):
    file = io.StringIO()
    show("net for npu", found, file)
    return file.getvalue()


def rows(text, *names):
    return [line.split() for line in text.splitlines() if line.startswith(names)]


def test_layers_with_a_fault():
    layers = (
        LayerError("conv", "Conv", "stem.weight", 40.04, 19.96, 30.0, math.inf, 12.5, 0.1),
        LayerError("join", "Add", "", 35.0, -math.inf, None, 35.0, 11.0, None),
    )
    cause = Cause("outliers", "conv", "join", "c", 3.0, "It reaches 500.", "--keep conv --keep join")
    text = shown(LayerErrors(8, "conv", layers, (cause,), {"last": "Kept by 'last'."}))

    assert text.startswith("net for npu\n\n")
    assert rows(text, "stem.weight ", "join") == [
        ["stem.weight", "Conv", "40.0", "20.0", "30.0", "exact", "12.5"],
        ["join", "Add", "35.0", "not", "finite", "–", "35.0", "11.0"],
    ]
    assert "over 8 samples" in text
    assert "The outputs part at stem.weight: 12.5 dB accumulated." in text
    assert "stem.weight: outliers. It reaches 500. To mend it: --keep conv --keep join" in text
    assert "last stays float: Kept by 'last'." in text


def test_layers_that_part_without_a_fault():
    layer = LayerError("conv", "Conv", "k", 40.0, 40.0, 40.0, 40.0, 12.5, None)
    text = shown(LayerErrors(8, "conv", (layer,), (), {}))

    assert "No fault was found in any one layer: the errors of many add up." in text


def test_layers_in_order():
    layer = LayerError("conv", "Conv", "k", 40.0, 40.0, 40.0, 40.0, 40.0, None)

    assert "No layer's accumulated SQNR is below 20 dB." in shown(LayerErrors(8, None, (layer,), (), {}))


def test_sensitivity_with_a_metric():
    effects = {"int4": Effect(12.25, 0.0321, 0.9, 0.875), "float16": Effect(math.inf, None, None, None)}
    layers = (
        LayerSensitivity("conv", "Conv", "k", effects),
        LayerSensitivity("join", "Add", "", {"int4": Effect(30, 0, 1, 1)}),
    )
    text = shown(Sensitivity(8, "top1", 0.9, layers))

    assert rows(text, "k ", "join") == [
        ["k", "12.2", "0.032", "0.8750", "exact", "–", "–"],
        ["join", "30.0", "0", "1.0000", "–", "–", "–"],
    ]
    assert "top1 of the float model: 0.9000." in text


def test_sensitivity_without_labels_has_no_column_for_them():
    layers = (LayerSensitivity("conv", "Conv", "k", {"int8": Effect(30.0, 0.5, 1.0, None)}),)
    text = shown(Sensitivity(8, None, None, layers))

    assert rows(text, "k ") == [["k", "30.0", "0.5"]]
    assert "float model" not in text


def test_weights_that_want_more_scales():
    reports = [
        WeightReport(
            "conv", "Conv", "k", (4, 3, 1, 1), 4, 12.345, 2, 5.0, 20.0, 40.0, "int8", "per-channel", "Do this."
        ),
        WeightReport("fc", "Gemm", "w", (4, 3), 4, 1.5, 0, 3.0, 40.0, 41.0, None, "per-tensor", ""),
    ]
    text = shown(tuple(reports))

    assert rows(text, "k ", "w ") == [
        ["k", "4×3×1×1", "12.3", "2", "20.0", "40.0", "per-channel"],
        ["w", "4×3", "1.5", "0", "40.0", "41.0", "per-tensor"],
    ]
    assert "Stored as: int8: 1, float: 1." in text
    assert "1 of 2 weights want a scale a channel and have one in all: Do this." in text
