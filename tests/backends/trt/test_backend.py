"""TensorRT as a target, on engines that are really built; where neither library is installed, this is skipped."""

import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pytest

from qdeploy.backend import Evidence
from qdeploy.backends.trt import backend, library
from qdeploy.backends.trt.backend import TensorRT
from qdeploy.backends.trt.contract import INT8_RULES, Options
from qdeploy.device import cuda_devices
from qdeploy.errors import InputError, UnavailableError
from qdeploy.model import DimRange
from qdeploy.quantize.float16 import cast_quantized, to_float16
from tests.contracts.backend_contract import (
    NET,
    BackendContract,
    float_model,
    outputs_of,
    quantized_model,
)

pytestmark = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX: pip install tensorrt-rtx"
)


class TestTensorRT(BackendContract):
    def backend(self):
        return TensorRT()


def lowered(text, folder, precision="int8", options=Options()):  # noqa: B008 - the defaults are a frozen value
    """A network, quantized and built: its artifact, and the names of the nodes that were to be quantized."""
    target = TensorRT()
    model = float_model(text, folder)
    contract = target.contract(precision, options)
    given = model
    if precision.startswith("int8"):
        given = quantized_model(model, contract, folder)
    if precision.endswith("fp16"):
        (folder / "float16").mkdir()
        given = cast_quantized(given, folder / "float16") if given is not model else _half(model, contract, folder)
    (folder / "artifact").mkdir()
    artifact = target.lower(given, precision, folder / "artifact", options)
    return artifact, getattr(given, "quantized_nodes", frozenset())


def _half(model, contract, folder):
    return to_float16(model, contract, folder / "float16")


def alone(nodes, weights, shape, more=""):
    return f"net (float[{shape}] x{more}) => (float y) {f'<{weights}>' if weights else ''} {{ {nodes} }}"


QUANTIZED = {
    "Conv": alone("[n] y = Conv (x, w, b)", "float[8,3,3,3] w, float[8] b", "1,3,8,8"),
    "Conv of one dimension": alone("[n] y = Conv (x, w)", "float[8,4,3] w", "1,4,16"),
    "Conv of three dimensions": alone("[n] y = Conv (x, w)", "float[8,4,3,3,3] w", "1,4,8,8,8"),
    "Conv grouped": alone("[n] y = Conv <group=2> (x, w)", "float[8,8,3,3] w", "1,16,8,8"),
    "Conv dilated, strided": alone(
        "[n] y = Conv <dilations=[2,2], strides=[2,2]> (x, w)", "float[8,3,3,3] w", "1,3,9,9"
    ),
    "Gemm with transB": alone("[n] y = Gemm <transB=1> (x, w, b)", "float[8,16] w, float[8] b", "2,16"),
    "Gemm": alone("[n] y = Gemm (x, w, b)", "float[16,8] w, float[8] b", "2,16"),
    "Gemm without bias": alone("[n] y = Gemm (x, w)", "float[16,8] w", "2,16"),
    "MatMul": alone("[n] y = MatMul (x, w)", "float[16,8] w", "2,3,16"),
    "MatMul of rank 3 by one matrix": alone("[n] y = MatMul (x, w)", "float[1,16,8] w", "2,3,16"),
    "MatMul by a batch of matrices": alone("[n] y = MatMul (x, w)", "float[2,16,8] w", "2,3,16"),
}

FLOAT = {
    "Conv depthwise": alone("[n] y = Conv <group=4> (x, w)", "float[4,1,3,3] w", "1,4,8,8"),
    "Conv with a computed bias": alone("[n] y = Conv (x, w, b)", "float[8,3,1,1] w", "1,3,8,8", ", float[8] b"),
    "ConvTranspose": alone("[n] y = ConvTranspose (x, w)", "float[3,4,3,3] w", "1,3,8,8"),
    "Gemm with a computed C": alone("[n] y = Gemm (x, w, c)", "float[4,5] w", "2,4", ", float[2,5] c"),
    "MatMul of two activations": alone("[n] y = MatMul (x, z)", "", "2,3,4", ", float[2,4,5] z"),
}


@pytest.mark.parametrize("precision", ["int8", "int8-fp16"])
@pytest.mark.parametrize("text", QUANTIZED.values(), ids=QUANTIZED)
def test_what_a_rule_quantizes_runs_in_integers(text, precision, tmp_path):
    artifact, quantized = lowered(text, tmp_path, precision)
    (layer,) = (layer for layer in artifact.layers if layer.node == "n")

    assert quantized == {"n"}
    assert (layer.precision, layer.weights, layer.inputs[0]) == ("int8", "int8", "int8")


@pytest.mark.parametrize("text", FLOAT.values(), ids=FLOAT)
def test_what_no_rule_quantizes_runs_in_float(text, tmp_path):
    artifact, quantized = lowered(text, tmp_path)

    assert "n" not in quantized
    assert {layer.precision for layer in artifact.layers if layer.node == "n"} == {"fp32"}


def test_rules_say_why():
    assert {rule.op_type for rule in INT8_RULES if rule.quantizes} == {"Conv", "Gemm", "MatMul"}
    assert all(rule.reason for rule in INT8_RULES)


def test_neighbours_of_a_depthwise_convolution_stay_int8(tmp_path):
    artifact, quantized = lowered(NET, tmp_path)
    layers = {layer.node: layer for layer in artifact.layers}

    assert quantized == {"conv", "pointwise", "classifier"}
    assert {layers[name].precision for name in quantized} == {"int8"}
    assert (layers["depthwise"].precision, layers["depthwise"].weights) == ("fp32", "fp32")
    assert layers["sum"].precision == "fp32"


def test_max_pooling_before_an_int8_convolution_runs_in_integers_of_itself(tmp_path):
    text = alone(
        "[a] c = Conv (x, w)\n[r] r = Relu (c)\n[pool] p = MaxPool <kernel_shape=[2,2]> (r)\n[n] y = Conv (p, v)",
        "float[16,16,3,3] w, float[16,16,3,3] v",
        "1,16,18,18",
    )
    artifact, _ = lowered(text, tmp_path)

    assert {layer.node: layer.precision for layer in artifact.layers}["pool"] == "int8"


@pytest.mark.parametrize("precision", ["int8", "fp16", "int8-fp16", "fp32"])
def test_an_artifact_is_the_plan_with_its_model(precision, tmp_path):
    artifact, _ = lowered(NET, tmp_path, precision)

    assert artifact.main == "model.plan"
    assert sorted(path.name for path in artifact.directory.iterdir()) == ["model.onnx", "model.plan", "plan.json"]
    assert artifact.path.read_bytes()[:4] == b"vtrt"


@pytest.mark.parametrize("precision", ["int8", "fp16", "int8-fp16", "fp32"])
def test_two_exports_of_one_size_are_equal_in_every_byte(precision, tmp_path):
    folders = [tmp_path / name for name in ("once", "again")]
    for folder in folders:
        folder.mkdir()

    once, again = (lowered(NET, folder, precision)[0].directory for folder in folders)

    assert {p.name: p.read_bytes() for p in once.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}


def test_a_half_network_runs_in_half(tmp_path):
    artifact, _ = lowered(NET, tmp_path, "fp16")

    kinds = {layer.node: (layer.precision, layer.weights) for layer in artifact.layers}
    assert kinds["conv"] == kinds["depthwise"] == kinds["pointwise"] == kinds["classifier"] == ("fp16", "fp16")


@pytest.mark.skipif(cuda_devices() > 0, reason="has a GPU")
@pytest.mark.parametrize("precision", ["int8", "fp16", "int8-fp16"])
def test_without_a_gpu_the_very_model_runs_on_the_cpu(precision, tmp_path):
    artifact, _ = lowered(NET, tmp_path, precision)
    model = tmp_path / "float" / "model.onnx"
    inputs = samples_for_net()

    with TensorRT().open(artifact, Options()) as runner:
        found = runner.run(inputs)

    assert runner.evidence is Evidence.SIMULATED
    assert not list(artifact.directory.glob("*.tmp"))
    for name, expected in outputs_of(model, inputs).items():
        limit = 0.01 if precision == "fp16" else 0.1
        assert 0 < np.abs(found[name] - expected).max() < limit * np.abs(expected).max()


def samples_for_net():
    return {"image": np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)}


@pytest.mark.skipif(cuda_devices() == 0, reason="NOT TESTED: engines run on a CUDA device, and there is none")
@pytest.mark.parametrize("precision", ["int8", "fp16", "int8-fp16", "fp32"])
def test_an_engine_is_near_its_own_graph(precision, tmp_path):
    artifact, _ = lowered(NET, tmp_path, precision)
    inputs = samples_for_net()

    with TensorRT().open(artifact, Options()) as runner:
        found = runner.run(inputs)

    assert runner.evidence is Evidence.EXECUTED
    for name, expected in outputs_of(artifact.directory / "model.onnx", inputs).items():
        assert np.abs(found[name] - expected).max() <= 0.05 * np.abs(expected).max()


# What is refused


DYNAMIC = alone("[n] y = Conv (x, w)", "float[8,3,3,3] w", "batch,3,8,8")


def with_dims(model, **dims):
    from dataclasses import replace

    return replace(model, dims=dims)


def test_a_dynamic_dimension_needs_a_range(tmp_path):
    model = float_model(DYNAMIC, tmp_path)

    with pytest.raises(InputError) as caught:
        TensorRT().check(model, "int8", Options())

    assert str(caught.value) == (
        "The input x=float32[batch,3,8,8] has the dynamic dimension 'batch', and TensorRT must know its range. "
        "Add --dim batch=minimum:typical:maximum, for example batch=1:1:8."
    )


def test_a_dynamic_dimension_with_a_range_is_built(tmp_path):
    model = with_dims(float_model(DYNAMIC, tmp_path), batch=DimRange(1, 4, 16))
    (tmp_path / "artifact").mkdir()

    TensorRT().check(model, "fp32", Options())
    artifact = TensorRT().lower(model, "fp32", tmp_path / "artifact", Options())

    assert '"batch"' not in (artifact.directory / "plan.json").read_text()
    assert backend.Record.read(artifact.directory).profile == {"x": ((1, 3, 8, 8), (4, 3, 8, 8), (16, 3, 8, 8))}


def test_an_operator_that_the_parser_lacks_is_named_before_calibration(tmp_path):
    model = float_model(alone("[odd] y = Det (x)", "", "2,3,3"), tmp_path)

    with pytest.raises(UnavailableError) as caught:
        TensorRT().check(model, "int8", Options())

    assert "cannot read model.onnx: odd (Det): " in str(caught.value)
    assert str(caught.value).endswith("Replace the operator in the model, or choose another target.")
    assert "cuda" not in str(caught.value).lower()


@pytest.mark.parametrize(
    ("arch", "what"),
    [
        (("sm90",), "tensorrt.arch cannot be 'sm90': TensorRT-RTX has no engines for H100 and H200. "),
        (("sm88",), "tensorrt.arch cannot be 'sm88'. Did you mean 'sm8"),
        (("turing",), "Known: sm75, sm80, sm86, sm89, sm120, sm121."),
        (("sm80", "sm80"), "tensorrt.arch names 'sm80' twice."),
    ],
)
def test_architectures_that_are_refused(arch, what):
    with pytest.raises(InputError) as caught:
        Options(arch=arch)

    assert what in str(caught.value)


PRODUCT = alone("[n] y = Gemm (x, w)", "float[16,8] w", "2,16")
SEQUENCE = alone("[n] y, h, c = LSTM <hidden_size=3> (x, w, r)", "float[1,12,4] w, float[1,12,3] r", "5,2,4")
TURING = Options(arch=("sm75", "sm89"))


@pytest.mark.parametrize(
    ("text", "precision", "lacking"),
    [
        (PRODUCT, "fp32", "products in float32"),
        (PRODUCT, "int8", "products in float32"),
        (SEQUENCE, "fp32", "products in float32"),
        (FLOAT["MatMul of two activations"], "int8", "products in float32"),
        (QUANTIZED["Conv"], "int8", "INT8 convolutions"),
        (QUANTIZED["Conv"], "int8-fp16", "INT8 convolutions"),
    ],
)
def test_kernels_that_turing_lacks_are_told_before_calibration(text, precision, lacking, tmp_path):
    with pytest.raises(UnavailableError) as caught:
        TensorRT().check(float_model(text, tmp_path), precision, TURING)

    assert str(caught.value) == (
        f"TensorRT-RTX has no {lacking} for sm75, and {precision} needs them: n. "
        "Choose fp16 for sm75, or leave it out of tensorrt.arch."
    )


@pytest.mark.parametrize(
    ("text", "precision", "kind"),
    [
        (PRODUCT, "int8-fp16", "int8"),
        (PRODUCT, "fp16", "fp16"),
        (SEQUENCE, "fp16", "fp16"),
        (QUANTIZED["Conv"], "fp32", "fp32"),
        (QUANTIZED["Conv"], "fp16", "fp16"),
        (FLOAT["Conv depthwise"], "int8", "fp32"),
    ],
)
def test_what_turing_has_is_built_for_it(text, precision, kind, tmp_path):
    TensorRT().check(float_model(text, tmp_path), precision, TURING)
    (tmp_path / "built").mkdir()

    artifact, _ = lowered(text, tmp_path / "built", precision, TURING)

    assert [layer.precision for layer in artifact.layers if layer.node == "n"] == [kind]


def test_the_builder_has_no_float_product_for_turing(tmp_path):
    """What is told before calibration, from the builder itself: a node that the user keeps in float comes this far."""
    with pytest.raises(UnavailableError) as caught:
        lowered(PRODUCT, tmp_path, "fp32", Options(arch=("sm75",)))

    assert "'n' for Turing (SM75): FP32 GEMM is not supported" in str(caught.value)
    assert str(caught.value).endswith("Choose fp16 or int8-fp16 for sm75, or leave it out of tensorrt.arch.")
    assert "catchCudaError" not in str(caught.value)


def test_the_builder_has_no_int8_convolution_for_turing(tmp_path):
    artifact, quantized = lowered(QUANTIZED["Conv"], tmp_path, "int8-fp16", TURING)

    assert quantized == {"n"}
    assert [layer.precision for layer in artifact.layers] == ["fp16"], "for sm89, too, since it is the same plan"


def test_a_workspace_that_is_too_small_is_told(tmp_path):
    text = alone("[n] y = Conv (x, w)", "float[256,256,3,3] w", "1,256,32,32")
    try:
        lowered(text, tmp_path, "fp32", Options(workspace_mib=1))
    except UnavailableError as error:
        assert str(error).endswith("Raise tensorrt.workspace_mib, or leave it at 0.")  # noqa: PT017 - it may build, too


def test_missing_libraries_are_explained(monkeypatch):
    monkeypatch.setattr(library, "find_spec", {}.get)

    found = TensorRT().availability()

    assert (found.ok, found.reason) == (False, "neither tensorrt nor tensorrt_rtx is installed")
    assert found.cure.startswith("pip install 'qdeploy[tensorrt-rtx]'")


def test_tensorrt_itself_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(library, "find_spec", {"tensorrt": True}.get)
    monkeypatch.setattr(backend, "cuda_devices", lambda: 0)

    assert TensorRT().availability().reason == "tensorrt builds on a machine with its GPU only"


# Progress and interrupts


def test_progress_rises_to_the_end(tmp_path):
    model = float_model(NET, tmp_path)
    (tmp_path / "artifact").mkdir()
    told = []

    TensorRT().lower(model, "fp32", tmp_path / "artifact", Options(), told.append)

    assert len(told) > 20
    assert told == sorted(told)
    assert told[0] < 0.1
    assert told[-1] == 1.0


def test_an_interrupt_cancels_the_build_and_leaves_nothing(tmp_path):
    """The builder has a hundred steps of this network; SIGINT comes at its first."""
    float_model(NET, tmp_path)
    (tmp_path / "artifact").mkdir()
    code = f"""
import os, signal, sys
from pathlib import Path
from qdeploy.graph import describe
from qdeploy.backends.trt.backend import TensorRT
from qdeploy.backends.trt.contract import Options
told = []
def tell(fraction):
    told.append(fraction)
    if len(told) == 1:
        os.kill(os.getpid(), signal.SIGINT)
    import time; time.sleep(0.01)
model = describe(Path({str(tmp_path / "float" / "model.onnx")!r}), "net", {{}})
try:
    TensorRT().lower(model, "fp32", Path({str(tmp_path / "artifact")!r}), Options(), tell)
except KeyboardInterrupt:
    print("cancelled" if told[-1] < 0.9 else told[-1])
"""
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)

    assert run.stdout.strip() == "cancelled", run.stderr
    assert list((tmp_path / "artifact").iterdir()) == []
    assert time.monotonic() - start < 60
