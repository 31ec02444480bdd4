import numpy as np
import pytest

from qdeploy.backends.coreml.backend import CoreML, Options
from qdeploy.quantize.weight_qdq import quantize_weight_qdq
from tests.backends.coreml.networks import lowered, net
from tests.contracts.backend_contract import NET, float_model

pytest.importorskip("coremltools")


def layers(artifact):
    return {layer.node: layer for layer in artifact.layers}


def test_types_of_a_quantized_network(tmp_path):
    _, artifact = lowered(NET, tmp_path, "int8")
    found = layers(artifact)

    assert (found["conv"].inputs, found["conv"].weights, found["conv"].outputs) == (("uint8",), "int8", ("uint8",))
    assert (found["sum"].inputs, found["sum"].weights) == (("uint8", "uint8"), None)
    assert (found["classifier"].inputs, found["classifier"].outputs) == (("uint8",), ("fp32",))
    assert {layer.precision for layer in found.values()} == {"int8"}


def test_an_absorbed_activation_runs_in_its_producers_layer(tmp_path):
    _, artifact = lowered(NET, tmp_path, "int8")
    found = layers(artifact)

    assert found["relu"].layer == found["conv"].layer
    assert found["relu"].fused_with == ("conv",)


@pytest.mark.parametrize(("precision", "kind"), [("fp32", "fp32"), ("fp16", "fp16")])
def test_floats_are_told_apart(precision, kind, tmp_path):
    _, artifact = lowered(NET, tmp_path, precision)

    assert {layer.precision for layer in artifact.layers} == {kind}


def test_a_bias_that_was_put_into_a_product_runs_there(tmp_path):
    text = net("[p] m = MatMul (x, w)\n[b] y = Add (m, c)", "float[4,5] w, float[5] c", "float[2,3,4] x")
    _, artifact = lowered(text, tmp_path)
    found = layers(artifact)

    assert found["p"].layer == found["b"].layer
    assert found["b"].layer.startswith("linear")


def test_weights_alone_count_as_int8_where_nothing_else_was_asked_for(tmp_path):
    model = float_model(
        net(
            "[l] y, h, c = LSTM <hidden_size=3> (x, w, r)",
            "float[1,12,4] w, float[1,12,3] r",
            "float[5,2,4] x",
            "float y, float h, float c",
        ),
        tmp_path,
    )
    (tmp_path / "q").mkdir()
    (tmp_path / "a").mkdir()
    quantized = quantize_weight_qdq(model, CoreML().contract("int8-weights", Options()), tmp_path / "q")
    artifact = CoreML().lower(quantized, "int8-weights", tmp_path / "a", Options())

    assert quantized.quantized_nodes == {"l"}
    assert layers(artifact)["l"].weights == "int8"
    assert layers(artifact)["l"].precision == "int8"


@pytest.mark.parametrize("op_type", ["LSTM", "GRU"])
def test_recurrent_weights_are_int8_among_floats(op_type, tmp_path):
    gates = {"LSTM": 4, "GRU": 3}[op_type]
    text = net(
        f"[l] a = {op_type} <hidden_size=3> (x, w, r)\n[s] s = Squeeze (a, d)\n[m] y = MatMul (s, v)",
        f"float[1,{3 * gates},4] w, float[1,{3 * gates},3] r, float[3,4] v, int64[1] d = {{1}}",
        "float[S,2,4] x",
    )
    model, artifact = lowered(text, tmp_path, "int8")
    found = layers(artifact)

    assert model.quantized_nodes == {"l", "m"}
    assert (found["l"].precision, found["l"].weights, found["l"].inputs[0]) == ("int8", "int8", "fp32")
    assert (found["m"].precision, found["m"].weights, found["m"].inputs[0]) == ("int8", "int8", "uint8")


def test_a_weight_that_is_float_in_the_package_is_not_called_int8(tmp_path, monkeypatch):
    from qdeploy.backends.coreml import call, package

    monkeypatch.setattr(call.Call, "emitted", lambda _, o: o.real() if isinstance(o, call.IntegerConstant) else o)
    monkeypatch.setattr(package, "_integer_bytes", lambda _: 0)
    _, artifact = lowered(NET, tmp_path, "int8")

    assert np.unique([layers(artifact)[name].precision for name in ("conv", "depthwise", "classifier")]) == ["fp32"]
