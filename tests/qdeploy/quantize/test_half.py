"""Weights in float16: half the size, and values that float16 does not hold left alone."""

import numpy as np
import pytest

from qdeploy import graph as questions
from qdeploy.backends.ort_cpu import Options, OrtCpu
from qdeploy.quantize.half import to_half
from qdeploy.quantize.lint import lint
from tests.contracts.backend_contract import NET, float_model, outputs_of, samples_for

CONTRACT = OrtCpu().contract("fp16", Options())


def halved(model, folder, keep=()):
    folder.mkdir()
    result = to_half(model, CONTRACT, folder, keep)
    assert lint(questions.load_graph(result.path), CONTRACT) == ()
    return result


def constants(model):
    graph = questions.load_graph(model.path)
    return {name: v.const_value.numpy() for each in graph.graphs() for name, v in each.initializers.items()}


@pytest.mark.parametrize("level", ["disable", "all"])
def test_the_outputs_are_those_of_the_rounded_weights(level, tmp_path):
    text = "net (float[N,16] x) => (float y) <float[16,8] w, float[8] b> { [n] y = Gemm (x, w, b) }"
    model = float_model(text, tmp_path)
    given = constants(model)
    x = samples_for(model, number=1)[0].inputs["x"]

    found = outputs_of(halved(model, tmp_path / "half").path, {"x": x}, level)["y"]

    expected = x @ given["w"].astype(np.float16).astype(np.float32) + given["b"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_it_is_half_the_size_and_its_bytes_are_the_same_again(tmp_path):
    model = float_model("net (float[N,256] x) => (float y) <float[256,256] w> { [n] y = MatMul (x, w) }", tmp_path)

    first, second = halved(model, tmp_path / "first"), halved(model, tmp_path / "second")

    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.path.stat().st_size < 0.51 * model.path.stat().st_size
    described = questions.describe(first.path, "net", {})
    assert (described.inputs, described.outputs) == (model.inputs, model.outputs)


@pytest.mark.parametrize("level", ["disable", "all"])
def test_masks_beyond_float16_still_mask(level, tmp_path):
    """Softmax over scores of which some are masked, one row wholly."""
    text = """net (float[1,4,4] x, bool[1,1,4] keep) => (float y) <float[4,4] w> {
        zero = Constant <value = float[1,1] {0.0}> () lowest = Constant <value = float[1,1] {-3.4e38}> ()
        [mask] m = Where (keep, zero, lowest) [scores] s = MatMul (x, w) [sum] a = Add (s, m)
        [soft] y = Softmax (a) }"""
    model = float_model(text, tmp_path)
    result = halved(model, tmp_path / "half")
    x = 100 * np.random.default_rng(0).standard_normal((1, 4, 4)).astype(np.float32)

    for keep in ([True, False, True, False], [False] * 4):
        inputs = {"x": x, "keep": np.array(keep).reshape(1, 1, 4)}
        expected, found = outputs_of(model.path, inputs)["y"], outputs_of(result.path, inputs, level)["y"]
        np.testing.assert_allclose(found, expected, atol=0.05)
        if any(keep):
            assert np.all(found[..., ~np.array(keep)] == 0)


def test_activations_beyond_float16_do_not_overflow(tmp_path):
    model = float_model("net (float[N,16] x) => (float y) <float[16,8] w> { [n] y = MatMul (x, w) }", tmp_path)
    inputs = {"x": np.full((2, 16), 1e6, np.float32)}

    found = outputs_of(halved(model, tmp_path / "half").path, inputs, "all")["y"]

    np.testing.assert_allclose(found, outputs_of(model.path, inputs)["y"], rtol=0.02)


def test_kept_nodes_keep_their_weights(tmp_path):
    result = halved(float_model(NET, tmp_path), tmp_path / "half", keep=["first", "classifier"])

    made = constants(result)

    assert {name for name in made if name.endswith("/half")} == {"w2/half", "w3/half"}
    assert {made[name].dtype for name in ("w1", "w4", "b1")} == {np.dtype(np.float32)}


def test_transposes_around_products_load(tmp_path):
    """What ONNX Runtime's converter makes of this crashes ONNX Runtime 1.32."""
    text = """net (float[20,2,1,48] x) => (float y) <float[96,7] w> {
        [a] t = Transpose <perm=[0,2,1,3]> (x) s = Constant <value_ints=[20,1,96]> () [r] r = Reshape (t, s)
        [b] u = Transpose <perm=[1,0,2]> (r) [n] y = MatMul (u, w) }"""
    model = float_model(text, tmp_path)
    inputs = samples_for(model, number=1)[0].inputs

    found = outputs_of(halved(model, tmp_path / "half").path, inputs, "all")["y"]

    np.testing.assert_allclose(found, outputs_of(model.path, inputs)["y"], atol=5e-3)
