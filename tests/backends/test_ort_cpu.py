import importlib.util
from collections import Counter

import numpy as np
import pytest

from qdeploy.backends.ort_cpu import INT8_RULES, Options, OrtCpu
from qdeploy.errors import InputError, InternalError
from tests.contracts.backend_contract import (
    NET,
    BackendContract,
    float_model,
    outputs_of,
    quantized_model,
    samples_for,
)


class TestOrtCpu(BackendContract):
    def backend(self):
        return OrtCpu()


class TestOrtCpuOnOneThread(BackendContract):
    def backend(self):
        return OrtCpu()

    def options(self):
        return Options(threads=1, graph_level="extended")


def layers_of(text, folder, options=Options(), *, keep=()):  # noqa: B008 - the defaults are a frozen value
    """Quantizes and lowers a network: its layers by node, and the names of the nodes that were to be quantized."""
    backend = OrtCpu()
    quantized = quantized_model(float_model(text, folder), backend.contract("int8", options), folder, keep)
    (folder / "artifact").mkdir()
    artifact = backend.lower(quantized, "int8", folder / "artifact", options)
    return {layer.node: layer for layer in artifact.layers}, quantized.quantized_nodes


def between(node, weights=""):
    """A network that computes z from the quantized c (and the quantized d) and hands it to a convolution."""
    return f"""net (float[1,4,8,8] x) => (float y, float out)
    <float[4,4,1,1] wc, float[4,4,1,1] wd, float[4,4,1,1] wy{weights}> {{
        [c] c = Conv (x, wc)
        [d] d = Conv (x, wd)
        {node}
        [y] y = Conv (z, wy)
        [read_d] out = Conv (d, wd)
    }}"""


def alone(nodes, weights, shape, more_inputs=""):
    """A network that computes y from x in a few nodes."""
    return f"net (float[{shape}] x{more_inputs}) => (float y) {f'<{weights}>' if weights else ''} {{ {nodes} }}"


GEMM_BEHIND = "\n[last] y = Gemm (z, wl)"
QUANTIZED = {
    "Conv": alone("[n] y = Conv (x, w, b)", "float[4,3,3,3] w, float[4] b", "1,3,8,8"),
    "Conv grouped": alone("[n] y = Conv <group=2> (x, w)", "float[4,2,3,3] w", "1,4,8,8"),
    "Conv depthwise": alone("[n] y = Conv <group=4> (x, w)", "float[4,1,3,3] w", "1,4,8,8"),
    "Conv dilated, strided": alone(
        "[n] y = Conv <dilations=[2,2], strides=[2,2]> (x, w)", "float[4,3,3,3] w", "1,3,9,9"
    ),
    "Conv 1-D": alone("[n] y = Conv (x, w)", "float[4,3,3] w", "1,3,8"),
    "Conv 3-D": alone("[n] y = Conv (x, w)", "float[4,3,3,3,3] w", "1,3,5,5,5"),
    "Conv, dynamic batch": alone("[n] y = Conv (x, w)", "float[4,3,3,3] w", "N,3,8,8"),
    "Gemm": alone("[n] y = Gemm (x, w, b)", "float[4,5] w, float[5] b", "2,4"),
    "Gemm transB": alone("[n] y = Gemm <transB=1> (x, w, b)", "float[5,4] w, float[5] b", "2,4"),
    "Gemm transA": alone("[n] y = Gemm <transA=1> (x, w, b)", "float[4,5] w, float[5] b", "4,2"),
    "Gemm without C": alone("[n] y = Gemm (x, w)", "float[4,5] w", "2,4"),
    "Gemm with C [1, n]": alone("[n] y = Gemm (x, w, b)", "float[4,5] w, float[1,5] b", "2,4"),
    "Gemm with factors": alone("[n] y = Gemm <alpha=0.5, beta=2.0> (x, w, b)", "float[4,5] w, float[5] b", "2,4"),
    "Gemm from MatMul and Add": alone("[n] m = MatMul (x, w)\n[a] y = Add (m, b)", "float[4,5] w, float[5] b", "2,4"),
    "Gemm inside": alone(f"[n] z = Gemm (x, w, b){GEMM_BEHIND}", "float[4,5] w, float[5] b, float[5,3] wl", "2,4"),
    "Gemm transB inside": alone(
        f"[n] z = Gemm <transB=1> (x, w, b){GEMM_BEHIND}", "float[5,4] w, float[5] b, float[5,3] wl", "2,4"
    ),
    "MatMul": alone("[n] y = MatMul (x, w)", "float[4,5] w", "2,4"),
    "MatMul of rank 3": alone("[n] y = MatMul (x, w)", "float[4,5] w", "2,3,4"),
    "MatMul by a batch of weights": alone("[n] y = MatMul (x, w)", "float[2,4,5] w", "2,3,4"),
    "MatMul and Add, dynamic": alone("[n] m = MatMul (x, w)\n[a] y = Add (m, b)", "float[4,5] w, float[5] b", "N,S,4"),
    "MatMul of rank 3 and Add": alone("[n] m = MatMul (x, w)\n[a] y = Add (b, m)", "float[4,5] w, float[5] b", "2,3,4"),
    "Gather of rows": alone("i = Cast <to=7> (x)\n[n] y = Gather (w, i)", "float[8,6] w", "2,3"),
    "Add": between("[n] z = Add (c, d)"),
    "Add a constant": between("[n] z = Add (c, k)", ", float[1,4,1,1] k"),
    "Add and Relu": between("[n] a = Add (c, d)\n[r] z = Relu (a)"),
    "Mul": between("[n] z = Mul (c, d)"),
    "Mul by a constant": between("[n] z = Mul (c, k)", ", float[1,4,1,1] k"),
    "Mul by a gate": between("[g] g = GlobalAveragePool (d)\n[s] s = Sigmoid (g)\n[n] z = Mul (c, s)"),
    "Concat": between("[n] z = Concat <axis=2> (c, d)"),
    "GlobalAveragePool": between("[n] z = GlobalAveragePool (c)"),
    "AveragePool": between("[n] z = AveragePool <kernel_shape=[2,2], strides=[2,2]> (c)"),
    "AveragePool of less than a window": between(
        "[n] z = AveragePool <kernel_shape=[9,9], strides=[9,9], ceil_mode=1> (c)"
    ),
    "AveragePool padded": between("[n] z = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1]> (c)"),
    "LeakyRelu": between("[n] z = LeakyRelu (c)"),
    "Sigmoid": between("[n] z = Sigmoid (c)"),
    "Min with constants": between("b = Abs (k)\n[n] z = Min (c, b)", ", float[1,4,1,1] k"),
    "Min with one constant": between("b = Constant <value_float=0.25> ()\n[n] z = Min (c, b)"),
    "Min behind Relu": between("b = Abs (k)\n[r] r = Relu (c)\n[n] z = Min (r, b)", ", float[1,4,1,1] k"),
    "MaxPool": between("[n] z = MaxPool <kernel_shape=[2,2], strides=[2,2]> (c)"),
    **{
        f"Resize {mode}": between(
            "s = Constant <value_floats=[1.0,1.0,2.0,2.0]> ()\n"
            f'[n] z = Resize <mode="nearest", coordinate_transformation_mode="{mode}", nearest_mode="floor"> (c, , s)'
        )
        for mode in ("asymmetric", "half_pixel")
    },
    "Reshape": between("s = Constant <value_ints=[1,4,16,4]> ()\n[n] z = Reshape (c, s)"),
    "Flatten": alone("[c] c = Conv (x, w)\n[n] y = Flatten <axis=2> (c)", "float[4,3,1,1] w", "N,3,H,W"),
    "Squeeze": between("a = Constant <value_ints=[0]> ()\n[n] e = Squeeze (c, a)\n[u] z = Unsqueeze (e, a)"),
    "Unsqueeze": between("a = Constant <value_ints=[0]> ()\n[s] e = Squeeze (c, a)\n[n] z = Unsqueeze (e, a)"),
    "Transpose": alone(
        f"[g] g = Gemm (x, w)\n[n] z = Transpose (g){GEMM_BEHIND}", "float[4,5] w, float[2,3] wl", "2,4"
    ),
}
"""A network for each rule that quantizes, and for each form of the operator that may take another way through ORT."""

FLOAT = {
    "Gemm with a computed C": alone("[n] y = Gemm (x, w, c)", "float[4,5] w", "2,4", ", float[2,5] c"),
    "Conv with a computed bias": alone("[n] y = Conv (x, w, b)", "float[4,3,1,1] w", "1,3,8,8", ", float[4] b"),
    "ConvTranspose": alone("[n] y = ConvTranspose (x, w)", "float[3,4,3,3] w", "1,3,8,8"),
    "MatMul": alone("[n] y = MatMul (x, x2)", "", "2,3,4", ", float[2,4,5] x2"),
    "ReduceMean": between("a = Constant <value_ints=[3]> ()\n[n] z = ReduceMean (c, a)"),
    "Resize": between('s = Constant <value_floats=[1.0,1.0,2.0,2.0]> ()\n[n] z = Resize <mode="linear"> (c, , s)'),
    "LayerNormalization": between("[n] z = LayerNormalization <axis=3> (c, g)", ", float[8] g"),
    "Gelu": between("[n] z = Gelu (c)"),
    "Gather": between("i = Constant <value_ints=[2,0]> ()\n[n] z = Gather <axis=2> (c, i)"),
    "Softmax": alone("[c] c = Conv (x, w)\n[n] y = Softmax (c)", "float[4,3,1,1] w", "1,3,8,8"),
}


@pytest.mark.parametrize("text", QUANTIZED.values(), ids=QUANTIZED)
def test_what_a_rule_quantizes_runs_in_integers(text, tmp_path):
    layers, quantized = layers_of(text, tmp_path)

    assert "n" in quantized
    assert {name: layers[name].precision for name in quantized} == dict.fromkeys(quantized, "int8")


@pytest.mark.parametrize("text", FLOAT.values(), ids=FLOAT)
def test_what_no_rule_quantizes_runs_in_float(text, tmp_path):
    layers, quantized = layers_of(text, tmp_path)

    assert "n" not in quantized
    assert layers["n"].precision == "fp32"


def test_a_pool_of_less_than_a_window_gives_what_its_qdq_graph_gives(tmp_path):
    text = QUANTIZED["AveragePool of less than a window"]
    backend = OrtCpu()
    quantized = quantized_model(float_model(text, tmp_path), backend.contract("int8", Options()), tmp_path)
    (sample, *_) = samples_for(quantized.float_model)

    exact = outputs_of(quantized.path, sample.inputs)
    fused = outputs_of(quantized.path, sample.inputs, "all")

    np.testing.assert_allclose(fused["y"], exact["y"], atol=0.05 * np.abs(exact["y"]).max())


@pytest.mark.parametrize("case", ["Min with constants", "Min with one constant", "Min behind Relu"])
def test_a_minimum_of_integers_is_that_of_its_qdq_graph(case, tmp_path):
    backend, options = OrtCpu(), Options()
    quantized = quantized_model(float_model(QUANTIZED[case], tmp_path), backend.contract("int8", options), tmp_path)
    (tmp_path / "artifact").mkdir()
    artifact = backend.lower(quantized, "int8", tmp_path / "artifact", options)

    for sample in samples_for(quantized.float_model):
        planned, lowered = (outputs_of(path, sample.inputs) for path in (quantized.path, artifact.path))
        np.testing.assert_array_equal(planned["y"], lowered["y"])


MINIMA = ["[n] z = Min (c, d)", "[n] z = Min (c, k, d)", "b = Constant <value_float=-0.25> ()\n[n] z = Min (c, b)"]


@pytest.mark.parametrize("node", MINIMA)
def test_a_minimum_of_computed_or_negative_values_stays_float(node, tmp_path):
    layers, quantized = layers_of(between(node, ", float[1,4,1,1] k"), tmp_path)

    assert "n" not in quantized
    assert layers["n"].precision == "fp32"


def test_every_rule_has_been_tried():
    assert {rule.op_type for rule in INT8_RULES if rule.quantizes} == {name.split()[0].strip(",") for name in QUANTIZED}
    assert {rule.op_type for rule in INT8_RULES if not rule.quantizes} == {name.split()[0] for name in FLOAT}


@pytest.mark.parametrize("level", ["disable", "basic"])
def test_nothing_runs_in_integers_before_onnx_runtime_fuses(level, tmp_path):
    layers, quantized = layers_of(NET, tmp_path, Options(graph_level=level))

    assert {layers[name].precision for name in quantized - {"flat"}} == {"fp32"}


def test_types_of_a_quantized_network(tmp_path):
    layers, _ = layers_of(NET, tmp_path)

    conv, summed, classifier = layers["conv"], layers["sum"], layers["classifier"]
    assert (conv.inputs, conv.weights, conv.outputs) == (("uint8",), "int8", ("uint8",))
    assert (summed.inputs, summed.weights, summed.outputs) == (("uint8", "uint8"), None, ("uint8",))
    assert (classifier.inputs, classifier.weights, classifier.outputs) == (("uint8",), "int8", ("fp32",))
    assert Counter(layer.precision for layer in layers.values()) == {"int8": 8}


def test_an_absorbed_activation_runs_in_its_producers_layer(tmp_path):
    layers, _ = layers_of(NET, tmp_path)

    assert layers["relu"].layer == layers["conv"].layer
    assert layers["relu"].fused_with == ("conv",)
    assert layers["conv"].fused_with == ("relu",)


def test_a_kept_node_runs_in_float(tmp_path):
    layers, quantized = layers_of(NET, tmp_path, keep=["depthwise"])

    assert "depthwise" not in quantized
    assert (layers["depthwise"].precision, layers["depthwise"].weights) == ("fp32", "fp32")


def test_a_transposition_merged_into_another_is_unknown(tmp_path):
    layers, quantized = layers_of(between("[n] z = Transpose <perm=[0,1,3,2]> (c)"), tmp_path)

    assert "n" in quantized
    assert layers["n"].precision == "unknown"


def test_layers_of_a_float_model(tmp_path):
    """Wide enough for ORT's blocked layout, which runs activations and residual sums inside convolutions."""
    text = """net (float[1,16,8,8] x) => (float y) <float[16,16,3,3] w1, float[16,16,1,1] w2> {
        [c1] a = Conv <pads=[1,1,1,1]> (x, w1)
        [r1] b = Relu (a)
        [c2] c = Conv (b, w2)
        [add] d = Add (c, b)
        [r2] y = Relu (d)
    }"""
    model = float_model(text, tmp_path)
    (tmp_path / "artifact").mkdir()

    layers = {x.node: x for x in OrtCpu().lower(model, "fp32", tmp_path / "artifact", Options()).layers}

    assert {layer.precision for layer in layers.values()} == {"fp32"}
    assert layers["r1"].layer == layers["c1"].layer
    assert layers["add"].layer == layers["r2"].layer == layers["c2"].layer != layers["c1"].layer


def test_shape_computations_are_no_layers(tmp_path):
    text = """net (float[N,4,8,8] x) => (float y) <float[4,4,1,1] w> {
        [c] c = Conv (x, w)
        [shape] s = Shape <start=0, end=1> (c)
        m = Constant <value_ints=[-1]> ()
        [sizes] t = Concat <axis=0> (s, m)
        [n] y = Reshape (c, t)
    }"""

    layers, _ = layers_of(text, tmp_path)

    assert set(layers) == {"c", "n"}
    assert layers["n"].inputs == ("uint8", "int64")


def test_an_artifact_is_the_model_and_nothing_else(tmp_path):
    model = float_model(NET, tmp_path)
    (tmp_path / "artifact").mkdir()

    artifact = OrtCpu().lower(model, "fp32", tmp_path / "artifact", Options())

    assert [path.name for path in artifact.directory.iterdir()] == ["model.onnx"]
    assert artifact.path.read_bytes() == model.path.read_bytes()


def test_int8_outputs_are_near_the_float_models(tmp_path):
    model = float_model(NET, tmp_path)
    quantized = quantized_model(model, OrtCpu().contract("int8", Options()), tmp_path)
    inputs = samples_for(model, number=1)[0].inputs

    expected, found = outputs_of(model.path, inputs), outputs_of(quantized.path, inputs, "all")

    for name, array in expected.items():
        assert np.abs(found[name] - array).max() < 0.05 * np.abs(array).max()


def test_missing_onnxruntime_is_explained(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", {}.get)

    found = OrtCpu().availability()

    assert (found.ok, found.reason, found.cure) == (
        False,
        "onnxruntime is not installed",
        "pip install 'qdeploy[cpu]'",
    )


def test_a_wrong_input_is_told_with_what_the_model_takes(tmp_path):
    model = float_model(NET, tmp_path)
    (tmp_path / "artifact").mkdir()
    artifact = OrtCpu().lower(model, "fp32", tmp_path / "artifact", Options())

    with OrtCpu().open(artifact, Options()) as runner, pytest.raises(InputError) as caught:
        runner.run({"image": np.zeros((2, 3, 8, 8))})

    assert str(caught.value).startswith("ONNX Runtime cannot run model.onnx on image=float64[2, 3, 8, 8]: ")
    assert str(caught.value).endswith("The model takes image=tensor(float)[2, 3, 8, 8].")


def test_a_runner_outside_with_says_so(tmp_path):
    model = float_model(NET, tmp_path)
    (tmp_path / "artifact").mkdir()
    artifact = OrtCpu().lower(model, "fp32", tmp_path / "artifact", Options())

    with pytest.raises(InternalError, match=r"the runner of model\.onnx is used outside `with`"):
        OrtCpu().open(artifact, Options()).run({})


def stem(kernel, weight, shape="1,3,12,12", attributes="strides=[2,2]"):
    """A network whose first convolution reads the model's input."""
    return alone(
        f"[stem] s = Conv <{attributes}> (x, w)\n[next] y = Conv (s, wn)",
        f"float[{weight},{kernel}] w, float[4,8,1,1] wn",
        shape,
    )


def lowered(text, folder):
    """A network quantized and lowered, and its artifact."""
    quantized = quantized_model(float_model(text, folder), OrtCpu().contract("int8", Options()), folder)
    (folder / "artifact").mkdir()
    return quantized, OrtCpu().lower(quantized, "int8", folder / "artifact", Options())


def stem_weights(path):
    import onnx_ir as ir

    graph = ir.load(path).graph
    arrays = [value.const_value.numpy() for value in graph.initializers.values()]
    return [array for array in arrays if array.ndim > 1 and array.shape[0] == 8]


@pytest.mark.parametrize(
    ("kernel", "weight", "shape"),
    [
        ("3,3", "8,3", "1,3,12,12"),
        ("3,3", "8,1", "N,1,H,W"),
        ("1,1", "8,2", "1,2,12,12"),
        ("5,5", "8,7", "2,7,12,12"),
        ("3", "8,3", "1,3,12"),
    ],
)
def test_first_convolution_gets_channels_by_fours_and_gives_the_same(kernel, weight, shape, tmp_path):
    attributes = "strides=[2], pads=[1,1]" if kernel == "3" else "strides=[2,2], pads=[1,0,0,1]"
    text = stem(kernel, weight, shape, attributes)
    text = text.replace("[4,8,1,1]", "[4,8,1]") if kernel == "3" else text
    quantized, artifact = lowered(text, tmp_path)
    model = quantized.float_model
    channels = int(weight.split(",")[1])

    (wide,), (narrow,) = stem_weights(artifact.path), stem_weights(quantized.path)
    assert wide.dtype == np.int8
    assert wide.shape[1] == (4 if channels < 4 else 8)
    np.testing.assert_array_equal(wide[:, :channels], narrow)
    assert not wide[:, channels:].any()
    inputs = samples_for(model, 1, seed=3)[0].inputs
    if "N" in shape:
        inputs = {"x": np.random.default_rng(0).standard_normal((3, 1, 9, 7)).astype(np.float32)}
    np.testing.assert_array_equal(
        outputs_of(artifact.path, inputs)["y"], outputs_of(quantized.path, inputs, "all")["y"]
    )
    assert {layer.precision for layer in artifact.layers} == {"int8"}


@pytest.mark.parametrize(
    ("kernel", "weight", "shape", "attributes"),
    [
        ("3,3", "8,4", "1,4,12,12", "strides=[2,2]"),
        ("7,7", "8,3", "1,3,12,12", "strides=[2,2]"),
        ("2,2", "8,3", "1,3,12,12", "strides=[2,2]"),
        ("3,3", "8,1", "1,8,12,12", "group=8"),
    ],
    ids=["four channels", "large kernel", "twelve summands", "depthwise"],
)
def test_other_first_convolutions_are_written_as_they_are(kernel, weight, shape, attributes, tmp_path):
    quantized, artifact = lowered(stem(kernel, weight, shape, attributes), tmp_path)

    assert artifact.path.read_bytes() == quantized.path.read_bytes()


def test_widening_leaves_other_readers_of_the_input_alone(tmp_path):
    text = """net (float[1,3,8,8] x) => (float a, float b, float c)
    <float[8,3,3,3] w, float[4,3,4,4] v, float[4,3,3,3] v2> {
        [a] a = Conv (x, w)
        [b] b = Conv (x, v)
        [c] s = Conv (x, v2)
        [r] c = Relu (s)
    }"""
    quantized, artifact = lowered(text, tmp_path)

    inputs = samples_for(quantized.float_model, 1)[0].inputs
    plain, wide = outputs_of(quantized.path, inputs, "all"), outputs_of(artifact.path, inputs)
    for name in ("a", "b", "c"):
        np.testing.assert_array_equal(wide[name], plain[name])


def test_a_weight_that_two_convolutions_share_is_written_as_it_is(tmp_path):
    text = """net (float[1,3,8,8] x) => (float a, float b) <float[8,3,3,3] w> {
        [a] a = Conv (x, w)
        [b] b = Conv <strides=[2,2]> (x, w)
    }"""
    quantized, artifact = lowered(text, tmp_path)

    assert artifact.path.read_bytes() == quantized.path.read_bytes()
