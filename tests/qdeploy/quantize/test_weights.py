"""Integer weights under float activations, against the blocks computed by hand."""

import numpy as np
import pytest

from qdeploy import graph as questions
from qdeploy.backends.ort_cpu import Options, OrtCpu
from qdeploy.quantize.lint import lint
from qdeploy.quantize.weights import quantize_weights
from tests.contracts.backend_contract import float_model, outputs_of, samples_for

CONTRACT = OrtCpu().contract("int8-weights", Options())


def quantized(model, folder, keep=()):
    folder.mkdir()
    result = quantize_weights(model, CONTRACT, folder, keep)
    assert lint(questions.load_graph(result.path), CONTRACT) == ()
    return result


def constants(model):
    return {n: v.const_value.numpy() for n, v in questions.load_graph(model.path).graph.initializers.items()}


def layers_of(model, folder):
    folder.mkdir()
    return {layer.node: layer for layer in OrtCpu().lower(model, "int8-weights", folder, Options()).layers}


def rounded_in_blocks(weight, size=32):
    """A weight [inputs, outputs] after symmetric rounding of each `size` inputs of an output."""
    result = np.empty_like(weight)
    for start in range(0, len(weight), size):
        block = weight[start : start + size]
        scale = np.abs(block).max(axis=0) / 127
        result[start : start + size] = np.rint(block / scale) * scale
    return result


@pytest.mark.parametrize("inputs", [8, 32, 50, 64])
@pytest.mark.parametrize("text", ["MatMul (x, w)", "Gemm (x, w, b)", "Gemm <transB=1> (x, w, b)"])
def test_a_product_is_near_that_with_the_rounded_weight(text, inputs, tmp_path):
    shape = f"9,{inputs}" if "transB" in text else f"{inputs},9"
    head = f"net (float[N,{inputs}] x) => (float y) <float[{shape}] w, float[9] b>"
    model = float_model(f"{head} {{ [n] y = {text} }}", tmp_path)
    given = constants(model)
    weight = given["w"].T if "transB" in text else given["w"]
    x = samples_for(model, number=1)[0].inputs["x"]

    result = quantized(model, tmp_path / "quantized")

    found = outputs_of(result.path, {"x": x}, "all")["y"]
    expected = x @ rounded_in_blocks(weight) + (given["b"] if "Gemm" in text else 0)
    # The kernel rounds the activation to 8 bits, too.
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    layer = layers_of(result, tmp_path / "artifact")["n"]
    assert (layer.precision, layer.weights) == ("int8", "int8")
    assert (
        constants(result)["w/transposed_blocks/integers" if "transB" in text else "w/blocks/integers"].dtype == np.uint8
    )


def test_it_is_small_and_its_bytes_are_the_same_again(tmp_path):
    model = float_model("net (float[N,256] x) => (float y) <float[256,256] w> { [n] y = MatMul (x, w) }", tmp_path)

    first, second = quantized(model, tmp_path / "first"), quantized(model, tmp_path / "second")

    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.path.stat().st_size < 0.3 * model.path.stat().st_size
    described = questions.describe(first.path, "net", {})
    assert (described.inputs, described.outputs) == (model.inputs, model.outputs)


def test_products_around_an_activation_are_both_integer(tmp_path):
    """In the form of DequantizeLinear, ORT would leave the first in float."""
    text = """net (float[N,S,64] x) => (float y) <float[64,64] w, float[64,64] v> {
        [a] m = MatMul (x, w) [r] r = Relu (m) [b] y = MatMul (r, v) }"""
    result = quantized(float_model(text, tmp_path), tmp_path / "quantized")

    layers = layers_of(result, tmp_path / "artifact")

    assert (layers["a"].precision, layers["b"].precision) == ("int8", "int8")


def test_branches_read_weights_from_outside(tmp_path):
    text = """net (float[N,16] x, bool c) => (float y) <float[16,8] w> {
        [if] y = If (c) <
            then_branch = yes () => (float[N,8] p) { [inner] p = MatMul (x, w) },
            else_branch = no () => (float[N,8] q) { [again] z = MatMul (x, w) [r] q = Relu (z) }
        > }"""
    model = float_model(text, tmp_path)
    inputs = {"x": np.ones((2, 16), np.float32), "c": np.array(False)}

    result = quantized(model, tmp_path / "quantized")

    assert result.quantized_nodes == {"inner", "again"}
    expected, found = outputs_of(model.path, inputs)["y"], outputs_of(result.path, inputs, "all")["y"]
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_what_has_no_kernel_stays_float(tmp_path):
    text = """net (float[1,4,8,8] x) => (float y) <float[4,4,3,3] c, float[2,6,5] w, float[5,8] v> {
        [conv] a = Conv (x, c) s = Constant <value_ints=[4,2,3,6]> () [rs] r = Reshape (a, s)
        [batch] b = MatMul (r, w) [kept] y = MatMul (b, v) }"""

    result = quantized(float_model(text, tmp_path), tmp_path / "quantized", keep=["kept"])

    assert result.quantized_nodes == frozenset()
    assert {array.dtype.name for array in constants(result).values()} == {"float32", "int64"}
