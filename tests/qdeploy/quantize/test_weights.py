"""Integer weights under float activations, against the blocks computed by hand."""

import numpy as np
import pytest

from qdeploy import graph as questions
from qdeploy.backends.ort_cpu import Options, OrtCpu
from qdeploy.errors import InputError
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


INT4 = OrtCpu().contract("int4", Options())


def four_bits(weight, size=32):
    """A weight [inputs, outputs] on grids of 16 values, one for each `size` inputs of an output."""
    result = np.empty_like(weight)
    for start in range(0, len(weight), size):
        block = weight[start : start + size]
        low, high = np.minimum(block.min(axis=0), 0), np.maximum(block.max(axis=0), 0)
        scale = ((high - low) / 15).astype(np.float32)
        zero = np.rint(-low / scale)
        result[start : start + size] = (np.clip(np.rint(block / scale) + zero, 0, 15) - zero) * scale
    return result


def made(folder):
    folder.mkdir()
    return folder


def unpacked(stored, scale, zero_points, inputs):
    """The weight [inputs, outputs] that the inputs of MatMulNBits stand for, by its definition: low half first."""
    halves = np.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:2], -1).astype(np.float32)
    zeros = np.stack([zero_points & 15, zero_points >> 4], axis=-1).reshape(len(zero_points), -1)
    real = (halves - zeros[:, : scale.shape[1], None]) * scale[..., None]
    return real.reshape(len(stored), -1)[:, :inputs].T


def four_bit_model(model, folder, **options):
    folder.mkdir()
    contract = OrtCpu().contract("int4", Options(**options))
    result = quantize_weights(model, contract, folder)
    assert lint(questions.load_graph(result.path), contract) == ()
    return result


@pytest.mark.parametrize("inputs", [8, 32, 50, 100])
@pytest.mark.parametrize("text", ["MatMul (x, w)", "Gemm (x, w, b)", "Gemm <transB=1> (x, w, b)"])
def test_a_product_of_four_bits_is_near_that_with_the_rounded_weight(text, inputs, tmp_path):
    transposed = "transB" in text
    shape = f"9,{inputs}" if transposed else f"{inputs},9"
    head = f"net (float[N,{inputs}] x) => (float y) <float[{shape}] w, float[9] b>"
    model = float_model(f"{head} {{ [n] y = {text} }}", tmp_path)
    given = constants(model)
    weight = given["w"].T if transposed else given["w"]
    x = samples_for(model, number=1)[0].inputs["x"]

    result = four_bit_model(model, tmp_path / "quantized")

    stored = constants(result)
    parts = [stored[f"w/{'transposed_' * transposed}blocks/{part}"] for part in ("integers", "scale", "zero_point")]
    np.testing.assert_allclose(unpacked(*parts, inputs), four_bits(weight), rtol=1e-5, atol=1e-6)
    found = outputs_of(result.path, {"x": x}, "all")["y"]
    expected = x @ four_bits(weight) + (given["b"] if "Gemm" in text else 0)
    # The kernel rounds the activation to 8 bits, too.
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    layer = OrtCpu().lower(result, "int4", made(tmp_path / "artifact"), Options()).layers[0]
    assert (layer.precision, layer.weights) == ("int4", "int4")


@pytest.mark.parametrize("size", [16, 32, 128])
def test_bytes_are_those_of_onnx_runtimes_own_quantizer(size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # theirs writes a file where it is
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    text = "net (float[N,200] x) => (float y) <float[200,24] w> { [n] y = MatMul (x, w) }"
    model = float_model(text, tmp_path)
    quantizer = MatMulNBitsQuantizer(onnx.load(model.path), block_size=size, is_symmetric=False)
    quantizer.process()
    (node,) = quantizer.model.model.graph.node
    theirs = {each.name: onnx.numpy_helper.to_array(each) for each in quantizer.model.model.graph.initializer}
    integers, scale, zero_points = (theirs[name] for name in node.input[1:])

    ours = constants(four_bit_model(model, tmp_path / "quantized", block_size=size))

    stored, scales, zeros = (ours[f"w/blocks/{part}"] for part in ("integers", "scale", "zero_point"))
    np.testing.assert_allclose(scales, scale.reshape(scales.shape), rtol=1e-6)
    rows = (each.reshape(24, -1)[:, :100] for each in (stored, integers))  # what fills the last block is no weight
    np.testing.assert_array_equal(*rows)
    unused = 0xF0 if scales.shape[1] % 2 else 0  # half of the last byte stands for no block
    np.testing.assert_array_equal(zeros[:, -1] | unused, zero_points.reshape(zeros.shape)[:, -1] | unused)
    np.testing.assert_array_equal(zeros[:, :-1], zero_points.reshape(zeros.shape)[:, :-1])


def test_activations_stay_exact_at_a_lower_accuracy_level(tmp_path):
    text = "net (float[N,64] x) => (float y) <float[64,16] w> { [n] y = MatMul (x, w) }"
    model = float_model(text, tmp_path)
    result = four_bit_model(model, tmp_path / "quantized")
    x = samples_for(model, number=1)[0].inputs["x"]
    expected = x @ four_bits(constants(model)["w"])

    errors = []
    for level in (4, 1):
        options = Options(accuracy_level=level)
        artifact = OrtCpu().lower(result, "int4", made(tmp_path / f"level-{level}"), options)
        errors.append(np.abs(outputs_of(artifact.path, {"x": x}, "all")["y"] - expected).max())

    assert errors[1] < 1e-5 * np.abs(expected).max() < errors[0]


@pytest.mark.parametrize(
    ("option", "value", "takes"),
    [("block_size", 24, "16, 32, 64, 128, 256"), ("accuracy_level", 5, "0 to 4"), ("accuracy_level", -1, "0 to 4")],
)
def test_an_option_that_the_kernel_does_not_take_is_refused(option, value, takes):
    with pytest.raises(InputError, match=f"ort-cpu.{option} cannot be {value}.\\s*It takes: {takes}."):
        Options(**{option: value})


def test_other_blocks_than_asked_for_break_the_contract(tmp_path):
    text = "net (float[N,64] x) => (float y) <float[64,16] w> { [n] y = MatMul (x, w) }"
    result = four_bit_model(float_model(text, tmp_path), tmp_path / "quantized", block_size=16)

    (found,) = lint(questions.load_graph(result.path), INT4)

    assert "is stored as int4 in blocks of 16 (axis 0); ort-cpu takes uint4 asymmetric blocks of 32" in found.what
