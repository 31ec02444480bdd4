"""Integer weights and activations quantized at run time, against numpy's formulas and torch."""

import numpy as np
import pytest

from qdeploy import graph as questions
from qdeploy.backends.ort_cpu import Options, OrtCpu
from qdeploy.errors import InputError
from qdeploy.export import export, load
from qdeploy.model import ModelSource
from qdeploy.prepare import prepare
from qdeploy.quantize.dynamic import quantize_dynamic
from qdeploy.quantize.lint import lint
from qdeploy.samples.source import Sample, SampleSource
from tests.contracts.backend_contract import float_model, outputs_of

CONTRACT = OrtCpu().contract("int8-dynamic", Options())
RANDOM = np.random.default_rng(5)


def normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def folder(parent, name):
    path = parent / name
    path.mkdir()
    return path


def quantized(model, parent, *, contract=CONTRACT, keep=()):
    result = quantize_dynamic(model, contract, folder(parent, f"quantized-{len(list(parent.iterdir()))}"), keep)
    assert lint(questions.load_graph(result.path), contract) == ()
    assert result.float_model == model
    return result


def stored(model):
    """Element type of every constant of a model, subgraphs included, by name."""
    graph = questions.load_graph(model.path)
    return {name: value.dtype.name for each in graph.graphs() for name, value in each.initializers.items()}


def constants(model):
    return {n: v.const_value.numpy() for n, v in questions.load_graph(model.path).graph.initializers.items()}


def layers_of(model, parent):
    artifact = OrtCpu().lower(model, "int8-dynamic", folder(parent, "artifact"), Options())
    return {layer.node: layer for layer in artifact.layers}


def product_by_hand(x, w):
    """ONNX's DynamicQuantizeLinear and a symmetric weight, in float64 from the integers on."""
    low, high = min(0.0, x.min()), max(0.0, x.max())
    scale = (high - low) / 255
    zero = np.clip(np.rint(-low / scale), 0, 255)
    q = np.clip(np.rint(x / np.float32(scale)) + zero, 0, 255) - zero
    w_scale = np.abs(w).max(axis=0) / 127
    return q @ np.rint(w / w_scale) * scale * w_scale


@pytest.mark.parametrize("text", ["MatMul (x, w)", "Gemm (x, w)", "Gemm <transB=1> (x, w)"])
def test_a_product_follows_the_formula(text, tmp_path):
    shape = "8,16" if "transB" in text else "16,8"
    model = float_model(f"net (float[N,16] x) => (float y) <float[{shape}] w> {{ [n] y = {text} }}", tmp_path)
    weight = constants(model)["w"]
    x = normal(5, 16)

    found = outputs_of(quantized(model, tmp_path).path, {"x": x})["y"]

    # One step of the activation's grid may round the other way where float32 sums differ.
    np.testing.assert_allclose(found, product_by_hand(x, weight.T if "transB" in text else weight), atol=2e-5)


def test_inputs_and_outputs_stay_and_bytes_are_the_same_again(tmp_path):
    text = "net (float[N,S,16] x) => (float y) <float[16,8] w, float[8] b> { [n] m = MatMul (x, w) [a] y = Add (m, b) }"
    model = float_model(text, tmp_path)

    first, second = quantized(model, tmp_path), quantized(model, tmp_path)

    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.quantized_nodes == {"n"}
    described = questions.describe(first.path, "net", {})
    assert (described.inputs, described.outputs) == (model.inputs, model.outputs)


def test_products_of_one_tensor_quantize_it_once(tmp_path):
    text = """net (float[N,S,16] x) => (float q, float k) <float[16,8] wq, float[16,8] wk> {
        [q] q = MatMul (x, wq) [k] k = MatMul (x, wk) }"""
    model = quantized(float_model(text, tmp_path), tmp_path)

    operators = [node.op_type for node in questions.load_graph(model.path).graph]

    assert operators.count("DynamicQuantizeLinear") == 1
    assert {layer.precision for layer in layers_of(model, tmp_path).values()} == {"int8"}


def test_a_weight_that_two_products_share_is_stored_once(tmp_path):
    text = "net (float[N,16] x) => (float y) <float[16,16] w> { [a] z = MatMul (x, w) [b] y = MatMul (z, w) }"

    model = quantized(float_model(text, tmp_path), tmp_path)

    assert sorted(stored(model).values()) == ["FLOAT", "INT8", "INT8"]


def test_convolutions_kept_nodes_and_computed_weights_stay_float(tmp_path):
    text = """net (float[1,4,8,8] x) => (float y) <float[4,4,3,3] c, float[6,5] w, float[5,8] v> {
        [conv] a = Conv (x, c) [first] b = MatMul (a, w) [second] d = MatMul (b, v)
        [t] e = Transpose <perm=[0,1,3,2]> (d) [attention] y = MatMul (d, e) }"""

    model = quantized(float_model(text, tmp_path), tmp_path, keep=["second"])

    assert model.quantized_nodes == {"first"}
    assert {name for name, kind in stored(model).items() if kind == "FLOAT"} >= {"c", "v"}
    layers = layers_of(model, tmp_path)
    assert (layers["first"].precision, layers["second"].precision) == ("int8", "fp32")
    assert layers["attention"].precision != "int8"


def test_a_pattern_that_matches_nothing_is_refused(tmp_path):
    model = float_model("net (float[N,16] x) => (float y) <float[16,8] w> { [n] y = MatMul (x, w) }", tmp_path)

    with pytest.raises(InputError, match="Nothing in the model matches --keep 'decoder"):
        quantized(model, tmp_path, keep=["decoder*"])


RECURRENT = """net (float[7,2,6] x) => (float y, float h, float c)
<float[2,20,6] w, float[2,20,5] r, float[2,40] b> {
    [n] y, h, c = LSTM <hidden_size=5, direction="bidirectional"> (x, w, r, b) }"""


@pytest.mark.parametrize("contract", [CONTRACT, CONTRACT.with_per_tensor_weights()], ids=["channel", "tensor"])
def test_a_bidirectional_lstm_is_near_float(contract, tmp_path):
    model = float_model(RECURRENT, tmp_path)
    inputs = {"x": normal(7, 2, 6)}

    result = quantized(model, tmp_path, contract=contract)

    expected, found = outputs_of(model.path, inputs), outputs_of(result.path, inputs)
    for name, array in expected.items():
        assert np.abs(found[name] - array).max() < 0.02 * np.abs(array).max()
    assert layers_of(result, tmp_path)["n"].weights == "int8"


def test_the_weights_of_an_lstm_follow_the_formula(tmp_path):
    model = float_model(RECURRENT, tmp_path)
    weight = constants(model)["w"]

    made = constants(quantized(model, tmp_path))

    scale = np.abs(weight).max(axis=2) / 127
    np.testing.assert_allclose(made["w/recurrent/scale"], scale, rtol=1e-6)
    expected = np.rint(weight / scale[:, :, None]).transpose(0, 2, 1)
    np.testing.assert_array_equal(made["w/recurrent/integers"], expected)


@pytest.mark.parametrize(
    "node",
    ["LSTM <hidden_size=5, layout=1> (x, w, r)", "GRU <hidden_size=5> (x, g, s)", "RNN <hidden_size=5> (x, a, t)"],
)
def test_recurrences_without_a_kernel_stay_float(node, tmp_path):
    weights = "float[1,20,6] w, float[1,20,5] r, float[1,15,6] g, float[1,15,5] s, float[1,5,6] a, float[1,5,5] t"
    model = float_model(f"net (float[2,7,6] x) => (float y) <{weights}> {{ [n] y = {node} }}", tmp_path)

    result = quantized(model, tmp_path)

    assert result.quantized_nodes == frozenset()
    assert "INT8" not in stored(result).values()
    rule = next(rule for rule in CONTRACT.rules if rule.op_type == node.split()[0] and not rule.quantizes)
    assert rule.reason
    assert rule.cure


BRANCHES = """net (float[N,16] x, bool c) => (float y) <float[16,8] w, float[8,8] v> {
    [before] a = MatMul (x, w)
    [if] y = If (c) <
        then_branch = yes () => (float[N,8] p) { [inner] p = MatMul (a, v) },
        else_branch = no () => (float[N,8] q) { [again] z = MatMul (x, w) [r] q = Relu (z) }
    > }"""
LOOP = """net (float[N,8] x, int64 times) => (float y) <float[8,8] w> {
    go = Constant <value = bool {1}> ()
    shape = Constant <value_ints=[-1,8]> ()
    [loop] l = Loop (times, go, x) <body = step (int64 i, bool on, float[N,8] s) => (bool out, float[N,8] t) {
        out = Identity (on) [inner] m = MatMul (s, w) [tanh] t = Tanh (m) }>
    [rows] y = Reshape (l, shape) }"""


@pytest.mark.parametrize("branch", [True, False])
def test_branches_are_quantized_with_weights_from_outside(branch, tmp_path):
    model = float_model(BRANCHES, tmp_path)
    inputs = {"x": normal(3, 16), "c": np.array(branch)}

    result = quantized(model, tmp_path)

    assert result.quantized_nodes == {"before", "inner", "again"}
    assert sorted(stored(result).values()) == ["FLOAT", "FLOAT", "INT8", "INT8", "INT8", "INT8"]
    expected, found = outputs_of(model.path, inputs)["y"], outputs_of(result.path, inputs, "all")["y"]
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()
    layers = layers_of(result, tmp_path)
    assert {layers[name].precision for name in result.quantized_nodes} == {"int8"}


def test_the_body_of_a_loop_is_quantized(tmp_path):
    model = float_model(LOOP, tmp_path)
    inputs = {"x": normal(3, 8), "times": np.array(4)}

    result = quantized(model, tmp_path)

    expected, found = outputs_of(model.path, inputs)["y"], outputs_of(result.path, inputs, "all")["y"]
    assert np.abs(found - expected).max() < 0.05
    assert layers_of(result, tmp_path)["inner"].precision == "int8"


# ——— models of speech and text ———


def exported(module, example, parent):
    source = ModelSource(type(module).__name__, "module", module=module.eval(), example_inputs=example)
    sample = Sample({}, origin="none")
    loaded = load(source)
    sample = Sample(loaded.examples)
    samples = SampleSource("examples", lambda: iter((sample,)), size=1)
    return prepare(export(loaded, samples, folder(parent, "exported")), folder(parent, "prepared"))


def tagger():
    import torch

    class Tagger(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words = torch.nn.Embedding(200, 32)
            self.lstm = torch.nn.LSTM(32, 48, num_layers=2, bidirectional=True, batch_first=True)
            self.tags = torch.nn.Linear(96, 7)

        def forward(self, words):
            return self.tags(self.lstm(self.words(words))[0])

    torch.manual_seed(0)
    return Tagger(), lambda: torch.from_numpy(RANDOM.integers(0, 200, (1, 24)))


def speech():
    import torch

    class Speech(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv1d(20, 32, 5, padding=2)
            self.lstm = torch.nn.LSTM(32, 64, batch_first=True)
            self.words = torch.nn.Linear(64, 10)

        def forward(self, sound):
            heard = torch.relu(self.conv(sound)).transpose(1, 2)
            return self.words(self.lstm(heard)[0])

    torch.manual_seed(1)
    return Speech(), lambda: torch.from_numpy(normal(1, 20, 50))


@pytest.mark.parametrize("make", [tagger, speech])
def test_a_recurrent_model_from_torch_decides_as_before(make, tmp_path):
    import torch

    module, draw = make()
    model = exported(module, draw(), tmp_path)

    result = quantized(model, tmp_path)

    kinds = stored(result)
    recurrent = {name: kind for name, kind in kinds.items() if name.endswith("recurrent/integers")}
    assert len(recurrent) == 2 * (2 if make is tagger else 1)
    assert set(recurrent.values()) == {"INT8"}
    assert kinds.get("conv.weight", "FLOAT") == "FLOAT"
    assert (make is speech) == ("conv.weight" in kinds)
    same = []
    for _ in range(10):
        x = draw()
        with torch.no_grad():
            expected = module(x).numpy()
        found = outputs_of(result.path, {model.inputs[0].name: x.numpy()}, "all")[model.outputs[0].name]
        same.append(found.argmax(axis=-1) == expected.argmax(axis=-1))
    assert np.mean(same) >= 0.97
    assert result.path.stat().st_size < 0.5 * model.path.stat().st_size
