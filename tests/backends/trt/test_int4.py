"""Weights of 4 bits in engines that are really built: what the builder's log says of each, and what is refused."""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from qdeploy import graph as questions
from qdeploy.backends.ort_cpu import INT4_RULES
from qdeploy.backends.trt.backend import TensorRT
from qdeploy.backends.trt.contract import Options
from qdeploy.errors import InputError
from qdeploy.quantize.lint import lint
from qdeploy.quantize.weight_qdq import quantize_weight_qdq
from tests.contracts.backend_contract import float_model, outputs_of

pytestmark = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX: pip install tensorrt-rtx"
)

NET = """net (int64[1,8] i, float[4,3,8,8] x) => (float y, float z)
<float[100,256] w, float[256,384] v,
float[32,384] u, float[32] b, float[384,48] t, float[48,6] o, float[384,5] p, float[6,3,3,3] c> {
    [table] e = Gather (w, i)
    [matmul] m = MatMul (e, v)
    [gelu] g = Gelu (m)
    [shape] s = Constant <value_ints=[8,384]> ()
    [flat] f = Reshape (g, s)
    [gemm] h = Gemm <transB=1> (f, u, b)
    [other] k = Gemm (f, t)
    [small] n = MatMul (k, o)
    [odd] q = MatMul (f, p)
    [join] y = Concat <axis=1> (h, n, q)
    [conv] z = Conv (x, c)
}"""
"""The product `small` has several whole blocks of 16 inputs, and of no larger ones; `odd` has five outputs."""


def built(folder, options):
    """The quantized model, and the layers of its engine by node."""
    target, model = TensorRT(), float_model(NET, folder)
    for part in ("quantized", "artifact"):
        (folder / part).mkdir()
    contract = target.contract("int4", options)
    quantized = quantize_weight_qdq(model, contract, folder / "quantized")
    assert lint(questions.load_graph(quantized.path), contract) == ()
    artifact = target.lower(quantized, "int4", folder / "artifact", options)
    return quantized, {layer.node: layer for layer in artifact.layers}


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_products_and_tables_keep_their_weights_as_int4(size, tmp_path):
    options = Options(arch=("sm86", "sm120"), block_size=size)

    quantized, layers = built(tmp_path, options)

    weighted = {"table", "matmul", "gemm", "other"} | ({"small"} if size == 16 else set())
    assert quantized.quantized_nodes == weighted
    assert {name: layers[name].weights for name in weighted} == dict.fromkeys(weighted, "int4")
    assert {name: layers[name].precision for name in weighted} == dict.fromkeys(weighted, "int4")
    assert all(set(layers[name].inputs) <= {"fp32", "int64"} for name in weighted)
    assert (layers["conv"].precision, layers["conv"].weights) == ("fp32", "fp32")
    assert (layers["small"].precision == "fp32") == (size > 16)
    assert layers["odd"].precision == "fp32"


def test_weights_are_on_a_grid_without_zero_points(tmp_path):
    text = "net (float[2,160] x) => (float y) <float[160,8] w> { [n] y = MatMul (x, w) }"
    model = float_model(text, tmp_path)
    (tmp_path / "quantized").mkdir()
    path = quantize_weight_qdq(model, TensorRT().contract("int4", Options()), tmp_path / "quantized").path
    weight = questions.load_graph(model.path).graph.initializers["w"].const_value.numpy()
    blocks = [weight[start : start + 32] for start in range(0, 160, 32)]
    expected = np.concatenate([np.rint(b / (np.abs(b).max(axis=0) / 7)) * (np.abs(b).max(axis=0) / 7) for b in blocks])
    x = np.random.default_rng(0).standard_normal((2, 160)).astype(np.float32)

    stored = {name: value.const_value for name, value in questions.load_graph(path).graph.initializers.items()}

    assert [str(stored[f"w/plain/{part}"].dtype) for part in ("integers", "scale", "zero_point")] == [
        "INT4",
        "FLOAT",
        "INT4",
    ]
    assert not stored["w/plain/zero_point"].numpy().astype(np.int8).any()
    np.testing.assert_allclose(outputs_of(path, {"x": x})["y"], x @ expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "size"), [("64,8", 64), ("96,5", 32)], ids=["one block", "an odd number of outputs"])
def test_a_weight_that_the_builder_unpacks_by_itself_is_not_called_int4(shape, size, tmp_path):
    """Why the rules leave such weights float: quantized all the same, they are multiplied as floats."""
    options, target = Options(arch=("sm86",), block_size=size), TensorRT()
    inputs = shape.split(",")[0]
    text = f"net (float[8,{inputs}] x) => (float y) <float[{shape}] w> {{ [n] y = MatMul (x, w) }}"
    model, contract = float_model(text, tmp_path), target.contract("int4", options)
    (rule,) = [rule for rule in contract.rules if rule.op_type == "MatMul" and rule.quantizes]
    for part in ("quantized", "artifact"):
        (tmp_path / part).mkdir()
    anything = replace(contract, rules=(replace(rule, when=()),))
    quantized = quantize_weight_qdq(model, anything, tmp_path / "quantized")

    (layer,) = target.lower(quantized, "int4", tmp_path / "artifact", options).layers

    assert (layer.precision, layer.weights) == ("fp32", "fp32")


def test_int4_of_a_float_engine_is_not_claimed(tmp_path):
    """An engine of the float model, under the contract of int4: its weights are what the log says."""
    target, model = (
        TensorRT(),
        float_model("net (float[2,160] x) => (float y) <float[160,8] w> { [n] y = MatMul (x, w) }", tmp_path),
    )
    (tmp_path / "artifact").mkdir()

    (layer,) = target.lower(model, "int4", tmp_path / "artifact", Options(arch=("sm86",))).layers

    assert (layer.precision, layer.weights) == ("fp32", "fp32")


def test_zero_points_break_the_contract(tmp_path):
    text = "net (float[2,160] x) => (float y) <float[160,8] w> { [n] y = MatMul (x, w) }"
    model, contract = float_model(text, tmp_path), TensorRT().contract("int4", Options())
    (tmp_path / "quantized").mkdir()
    path = quantize_weight_qdq(model, replace(contract, rules=INT4_RULES), tmp_path / "quantized").path

    (found,) = lint(questions.load_graph(path), contract)

    assert (
        "is stored as uint4 asymmetric blocks of 32 (axis 0); tensorrt takes int4 symmetric blocks of 32" in found.what
    )


def test_a_block_size_that_is_not_supported_is_refused():
    with pytest.raises(InputError, match=r"tensorrt.block_size cannot be 24.\s*It takes: 16, 32, 64, 128."):
        Options(block_size=24)
