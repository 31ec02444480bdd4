"""Whole networks as engines for four architectures in one plan, with dynamic batch: every convolution and product."""

from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.networks import networks
from benchmarks.zoo import ZOO
from qdeploy.backends.trt.build import build as build_engine
from qdeploy.backends.trt.build import profile
from qdeploy.backends.trt.contract import Options
from qdeploy.backends.trt.library import library
from qdeploy.building import Making, build
from qdeploy.collect import collect
from qdeploy.model import DimRange
from qdeploy.outcome import Job
from qdeploy.pipeline import calibration_reader, look_up
from qdeploy.recipe import Recipe, TargetRequest
from qdeploy.samples.source import Sample

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX: pip install tensorrt-rtx"),
]

EXAMPLE = Path(__file__).parents[3] / "deploy_examples" / "02_efficientnet_lite0" / "model.py"
ARCHITECTURES = "sm80,sm86,sm89,sm120"
WEIGHTED = ("Conv", "Gemm", "MatMul", "ConvTranspose", "LSTM")

INT8 = {
    "ResNet-20": {"Conv": 21, "Gemm": 1},
    "ResNet-50": {"Conv": 53, "Gemm": 1},
    "EfficientNet-Lite0": {"Conv": 33, "Gemm": 1},
    "MiniLM": {"MatMul": 36},
    "LSTM tagger": {"MatMul": 1},
    "U-Net": {"Conv": 4},
    "two inputs": {"Conv": 1, "Gemm": 2},
}
"""What there is to quantize in each: by the papers' tables, every convolution that is not depthwise or transposed."""


@pytest.fixture(scope="module", params=INT8)
def prepared(request, tmp_path_factory):
    """A network, its float model and statistics of one sample."""
    import torch

    torch.set_num_threads(1)
    network = networks(ZOO)[request.param]
    model = network.prepared(tmp_path_factory.mktemp("network"))
    return network, model, collect(model, [Sample(network.sample)], threads=1)


def built(prepared, precision, folder):
    network, model, statistics = prepared
    target = TargetRequest("tensorrt", precision, {"arch": ARCHITECTURES})
    (job,) = look_up(Recipe(network.source, (target,)))
    assert isinstance(job, Job)
    for part in ("scratch", "bundle"):
        (folder / part).mkdir()
    return build(Making(job, model, statistics, calibration_reader("minmax"), folder / "scratch"), folder / "bundle")


@pytest.mark.parametrize("precision", ["int8", "int8-fp16"])
def test_everything_that_has_a_rule_is_int8(prepared, precision, tmp_path):
    each = built(prepared, precision, tmp_path)

    found = Counter(layer.op_type for layer in each.artifact.layers if layer.precision == "int8" and layer.weights)
    assert each.violations == ()
    assert dict(found) == INT8[prepared[0].name]
    with each.subject().runner as runner:
        assert runner.run(prepared[0].sample)


def test_half_is_half_and_half_the_size(prepared, tmp_path):
    half = built(prepared, "fp16", tmp_path)

    kinds = {layer.precision for layer in half.artifact.layers if layer.op_type in WEIGHTED}
    assert kinds <= {"fp16", "unknown"}
    assert "fp16" in kinds
    weights = prepared[1].path.stat().st_size
    assert half.artifact.path.stat().st_size < 0.6 * weights + 3e6, "kernels take a few megabytes"
    with half.subject().runner as runner:
        assert runner.run(prepared[0].sample)


@pytest.mark.parametrize("prepared", ["ResNet-50", "U-Net"], indirect=True)
def test_two_builds_are_equal_in_every_byte_for_one_size_and_in_every_layer_for_many(prepared, tmp_path):
    """Where sizes vary, the builder numbers the tensors that hold sizes by where they lie in memory."""
    network, model, _ = prepared
    path = built(prepared, "int8", tmp_path).artifact.directory / "model.onnx"
    options = Options(arch=tuple(ARCHITECTURES.split(",")))
    one_size = {name: DimRange(each.typical, each.typical, each.typical) for name, each in model.dims.items()}

    fixed, varying = (
        [build_engine(library(), path, profile(model.inputs, dims), options) for _ in range(2)]
        for dims in (one_size, model.dims)
    )

    assert fixed[0] == fixed[1], network.name
    assert varying[0].layer_log == varying[1].layer_log
    assert "Layers:" in varying[0].layer_log


@pytest.mark.data
def test_int8_efficientnet_keeps_its_answers(data, tmp_path):
    """The 200 calibration and 300 evaluation images; bias correction is the default."""
    import qdeploy

    folder = data / "imagenet"
    deployment = qdeploy.export(
        f"{EXAMPLE}:build",
        targets=["tensorrt:int8", "tensorrt:int8-fp16"],
        calibration=folder / "calibration",
        evaluation=folder / "evaluation",
        preprocessing="crop=224 scale=1 mean=127 std=128",
        output=tmp_path / "out",
    )

    for row in deployment.report.targets:
        assert (row.status, row.evidence) == ("pass", "simulated")
        assert row.agreement >= 0.97
        assert row.drop <= 0.01
        assert row.latency_ms is None
        assert row.speedup is None
