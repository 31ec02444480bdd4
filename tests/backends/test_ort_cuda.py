"""ORT on a GPU. What needs one is skipped where there is none; the rest is held everywhere."""

from pathlib import Path

import pytest

from qdeploy.backends import ort_cuda
from qdeploy.backends.ort_cuda import CONTRACTS, Options, OrtCuda, layers
from qdeploy.errors import InputError, UnavailableError
from qdeploy.graph import load_graph
from qdeploy.quantize.lint import lint
from qdeploy.scheme import Form
from qdeploy.session import SessionRunner
from tests.contracts.backend_contract import NET, BackendContract, float_model, outputs_of, quantized_model, samples_for

HERE = OrtCuda().availability()


class TestOrtCuda(BackendContract):
    def backend(self):
        return OrtCuda()

    def options(self):
        return Options(provider="tensorrt")


@pytest.mark.skipif(HERE.ok, reason="this machine has a GPU")
def test_without_a_gpu_it_is_unavailable_with_a_reason_and_a_cure():
    assert HERE.reason in ("onnxruntime-gpu is not installed", "no CUDA device is at hand")
    assert "qdeploy[gpu]" in HERE.cure


@pytest.mark.skipif(HERE.ok, reason="this machine has a GPU")
def test_without_the_provider_lowering_says_what_is_missing(tmp_path):
    model = float_model(NET, tmp_path)
    (tmp_path / "artifact").mkdir()

    with pytest.raises(UnavailableError, match=r"This onnxruntime has no CUDAExecutionProvider\. To get it: pip"):
        OrtCuda().lower(model, "fp32", tmp_path / "artifact", Options())


def test_int8_of_the_cuda_kernels_is_refused_before_any_work():
    with pytest.raises(InputError, match="ort-cuda:int8 needs the TensorRT provider") as refused:
        OrtCuda().check(None, "int8", Options())

    assert "--set ort-cuda.provider=tensorrt" in str(refused.value)
    OrtCuda().check(None, "int8", Options(provider="tensorrt"))
    OrtCuda().check(None, "fp16", Options())


@pytest.mark.parametrize("precision", CONTRACTS)
def test_contract_is_symmetric_with_float_biases(precision):
    contract = OrtCuda().contract(precision, Options())

    assert contract.bias == "float"
    schemes = [scheme for rule in contract.rules for scheme in (*rule.inputs.values(), rule.output) if scheme]
    assert all(scheme.symmetric and scheme.integer.signed for scheme in schemes)
    assert bool(schemes) == (contract.form is Form.QDQ)


def test_our_own_int8_graph_keeps_the_contract_and_runs(tmp_path):
    model = float_model(NET, tmp_path)
    contract = OrtCuda().contract("int8", Options(provider="tensorrt"))

    quantized = quantized_model(model, contract, tmp_path)

    assert lint(load_graph(quantized.path), contract) == ()
    assert quantized.quantized_nodes == {"conv", "pointwise", "classifier"}
    inputs = samples_for(model, 1)[0].inputs
    assert outputs_of(quantized.path, inputs).keys() == {"features", "logits"}


def test_layers_name_the_provider_and_claim_nothing_of_an_engine(tmp_path):
    graph = load_graph(float_model(NET, tmp_path).path)
    providers = {"conv": ort_cuda.TENSORRT, "relu": ort_cuda.TENSORRT, "depthwise": ort_cuda.CUDA, "pool": "CPU"}

    found = {layer.node: layer for layer in layers(graph, providers, "fp16")}

    assert (found["conv"].layer, found["conv"].precision, found["conv"].weights) == (ort_cuda.TENSORRT, "unknown", None)
    assert (found["depthwise"].layer, found["depthwise"].precision) == (ort_cuda.CUDA, "fp16")
    assert found["depthwise"].weights == "fp16"
    assert (found["pool"].layer, found["pool"].weights) == ("CPU", None)
    assert (found["classifier"].layer, found["classifier"].precision) == ("", "unknown")


def test_ort_tells_which_provider_took_each_node(tmp_path):
    import onnxruntime as ort

    model = float_model(NET, tmp_path)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(str(model.path), options, providers=["CPUExecutionProvider"])

    taken = ort_cuda._assigned(session)

    assert {"depthwise", "pointwise", "classifier"} <= taken.keys()
    assert set(taken.values()) == {"CPUExecutionProvider"}


def test_a_runner_opens_its_session_where_it_is_told_to():
    def opener():
        raise UnavailableError("There is no GPU.", "Get one.")

    with pytest.raises(UnavailableError, match="There is no GPU"), SessionRunner(Path("model.onnx"), opener=opener):
        pass
