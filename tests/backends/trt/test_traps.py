"""Every way in which other tools' QDQ models fail on TensorRT: the lint names the nodes before any build.

Each trap is tried on the builder, too: that it refuses the model, or runs it in float without a word.
"""

from importlib.util import find_spec

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdeploy.backends.trt.backend import TensorRT
from qdeploy.backends.trt.build import build
from qdeploy.backends.trt.contract import Options
from qdeploy.backends.trt.layer_log import layers
from qdeploy.backends.trt.library import library
from qdeploy.errors import UnavailableError
from qdeploy.graph import load_graph
from qdeploy.quantize.lint import lint

needs_builder = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX")

WEIGHTS = {"Conv": (8, 8, 3, 3), "ConvTranspose": (8, 8, 3, 3), "Gemm": (8, 8), "MatMul": (8, 8)}


class Net:
    """A QDQ model in the making: nodes in order, and constants."""

    def __init__(self):
        self.nodes, self.constants = [], []

    def constant(self, name, array):
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, op_type, inputs, name, **attributes):
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def pair(self, value, *, dtype=np.int8, zero=0, scale=0.05, kind=np.float32):
        scale = self.constant(f"{value}_scale", kind(scale))
        zero = self.constant(f"{value}_zero", dtype(zero))
        self.node("QuantizeLinear", [value, scale, zero], f"{value}_q")
        return self.node("DequantizeLinear", [f"{value}_q", scale, zero], f"{value}_dq")

    def stored(self, name, shape, *, axis=0, dtype=np.int8, zero=0, kind=np.float32):
        rng = np.random.default_rng(0)
        self.constant(f"{name}_int", rng.integers(1, 100, shape).astype(dtype))
        count = [] if axis is None else [shape[axis]]
        self.constant(f"{name}_scale", (np.linspace(0.01, 0.02, *count) if count else np.array(0.01)).astype(kind))
        self.constant(f"{name}_zero", np.full(count, zero, dtype))
        attributes = {} if axis is None else {"axis": axis}
        inputs = [f"{name}_{part}" for part in ("int", "scale", "zero")]
        return self.node("DequantizeLinear", inputs, f"{name}_dq", **attributes)

    def save(self, path, *, shape=(2, 8, 8, 8), opset=20, output="y"):
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape), (output, None)))
        graph = helper.make_graph(self.nodes, "net", [x], [y], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        onnx.save(onnx.shape_inference.infer_shapes(model), path)
        return path


def product(op_type, path, *, act=None, weight=None, bias=None, cast=False, opset=20, **attributes):
    """x ─► Q ─► DQ ─► operator(DQ'd weight) ─► y, with something wrong."""
    net = Net()
    x = net.pair("x", **(act or {}))
    w = net.stored("w", WEIGHTS[op_type], **(weight or {}))
    if cast:
        w = net.node("Cast", [w], "w_cast16", to=TensorProto.FLOAT16)
        w = net.node("Cast", [w], "w_cast32", to=TensorProto.FLOAT)
    inputs = [x, w]
    if bias == "int32":
        net.constant("b_int", np.arange(8, dtype=np.int32))
        net.constant("b_scale", np.full(8, 0.0005, np.float32))
        inputs.append(net.node("DequantizeLinear", ["b_int", "b_scale"], "b_dq", axis=0))
    net.node(op_type, inputs, "y", **attributes)
    shape = (2, 8, 8, 8) if op_type.startswith("Conv") else (2, 8)
    return net.save(path, shape=shape, opset=opset)


def lint_of(path, precision="int8"):
    return lint(load_graph(path), TensorRT().contract(precision, Options()))


def said(path, precision="int8"):
    """What the lint says, by node; every word of it comes with a reason and a cure."""
    found = lint_of(path, precision)
    assert all(v.reason.endswith(".") and v.cure.endswith(".") for v in found)
    return {v.node: v.what for v in found}


def refused(path):
    with pytest.raises(UnavailableError) as caught:
        build(library(), path, {}, Options(arch=("sm89",)))
    assert "catchCudaError" not in str(caught.value)
    return str(caught.value)


def precision_of(path, node="y"):
    log = build(library(), path, {}, Options(arch=("sm89",))).layer_log
    return {layer.node: layer.precision for layer in layers(log, load_graph(path))}[node]


SOUND = [
    ("Conv", {}, {}),
    ("Gemm", {"weight": {"axis": 1}}, {}),
    ("Gemm", {"weight": {"axis": 0}}, {"transB": 1}),
    ("MatMul", {"weight": {"axis": 1}}, {}),
    ("Conv", {"weight": {"axis": None}}, {}),
    *(("Conv", {"opset": opset}, {}) for opset in (13, 17, 21, 25)),
]


@pytest.mark.parametrize(("op_type", "changes", "attributes"), SOUND)
def test_a_sound_model_keeps_the_contract(op_type, changes, attributes, tmp_path):
    path = product(op_type, tmp_path / "m.onnx", **changes, **attributes)

    assert said(path) == {}


@needs_builder
@pytest.mark.parametrize(("op_type", "changes", "attributes"), SOUND)
def test_a_sound_model_runs_in_integers(op_type, changes, attributes, tmp_path):
    path = product(op_type, tmp_path / "m.onnx", **changes, **attributes)

    assert precision_of(path) == "int8"


REFUSED = {
    "an int32 bias": ("Conv", {"bias": "int32"}, {"y": "its bias ('b_dq') is int32; tensorrt takes it as float"}),
    "unsigned activations": (
        "Conv",
        {"act": {"dtype": np.uint8, "zero": 128}},
        {"y": "input 0 ('x_dq') is stored as uint8 symmetric per-tensor; tensorrt takes int8 symmetric per-tensor"},
    ),
    "a zero point": (
        "Conv",
        {"act": {"zero": 3}},
        {"y": "input 0 ('x_dq') is stored as int8 asymmetric per-tensor; tensorrt takes int8 symmetric per-tensor"},
    ),
    "a weight's zero point": ("Conv", {"weight": {"zero": 3}}, {"y": "is stored as int8 asymmetric"}),
    "unsigned weights": ("Conv", {"weight": {"dtype": np.uint8, "zero": 128}}, {"y": "is stored as uint8"}),
    "16-bit activations": ("Conv", {"act": {"dtype": np.int16}, "opset": 21}, {"y": "is stored as int16 symmetric"}),
}


@pytest.mark.parametrize(("op_type", "changes", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_the_parser_refuses_is_named(op_type, changes, expected, tmp_path):
    path = product(op_type, tmp_path / "m.onnx", **changes)
    found = said(path)

    assert found.keys() == expected.keys()
    assert all(expected[node] in what for node, what in found.items())


@needs_builder
@pytest.mark.parametrize(("op_type", "changes", "expected"), REFUSED.values(), ids=REFUSED)
def test_the_parser_does_refuse_it(op_type, changes, expected, tmp_path):
    text = refused(product(op_type, tmp_path / "m.onnx", **changes))

    assert "cannot read m.onnx: " in text
    assert text.endswith("qdeploy inspect --target tensorrt names every such node.")


SILENT = {
    "MatMul along its inputs": ("MatMul", {"weight": {"axis": 0}}, {}, {"y"}),
    "Conv along its inputs": ("Conv", {"weight": {"axis": 1}}, {}, {"y"}),
    "Gemm along its inputs": ("Gemm", {"weight": {"axis": 0}}, {}, {"y"}),
    "ConvTranspose": ("ConvTranspose", {"weight": {"axis": 1}}, {}, {"y"}),
    "Casts between": ("MatMul", {"weight": {"axis": 1}, "cast": True}, {}, {"w_cast16", "w_cast32"}),
}


@pytest.mark.parametrize(("op_type", "changes", "attributes", "nodes"), SILENT.values(), ids=SILENT)
def test_what_would_run_in_float_without_a_word_is_named(op_type, changes, attributes, nodes, tmp_path):
    path = product(op_type, tmp_path / "m.onnx", **changes, **attributes)

    assert nodes & said(path).keys()


@needs_builder
@pytest.mark.parametrize(("op_type", "changes", "attributes", "nodes"), SILENT.values(), ids=SILENT)
def test_the_builder_does_run_it_in_float(op_type, changes, attributes, nodes, tmp_path):
    path = product(op_type, tmp_path / "m.onnx", **changes, **attributes)

    assert precision_of(path) == "fp32"


STACKED = {
    "of one matrix, outputs": ((2, 4, 8), (1, 8, 8), 2, None),
    "of one matrix, outputs counted from the end": ((2, 4, 8), (1, 8, 8), -1, None),
    "of one matrix, one scale": ((2, 4, 8), (1, 8, 8), None, None),
    "of one matrix, a scale for it": ((2, 4, 8), (1, 8, 8), 0, None),
    "of one matrix, inputs": ((2, 4, 8), (1, 8, 8), 1, 1),
    "of one matrix, more dimensions": ((2, 3, 4, 8), (1, 1, 8, 8), 3, None),
    "of matrices, outputs": ((2, 4, 8), (2, 8, 8), 2, None),
    "of matrices, one scale": ((2, 4, 8), (2, 8, 8), None, None),
    "of matrices, inputs": ((2, 4, 8), (2, 8, 8), 1, 1),
    "of matrices, a scale for each": ((2, 4, 8), (2, 8, 8), 0, 0),
    "of matrices, fewer rows": ((2, 8), (3, 8, 8), 2, None),
}
"""Shapes of activation and weight, axis of the weight's scales, and the axis that is named; None where none is."""


def stacked(case, path):
    shape, weight, axis, _ = case
    net = Net()
    net.node("MatMul", [net.pair("x"), net.stored("w", weight, axis=axis)], "y")
    return net.save(path, shape=shape)


@pytest.mark.parametrize("case", STACKED.values(), ids=STACKED)
def test_a_weight_of_more_than_two_dimensions_has_its_outputs_last(case, tmp_path):
    found = said(stacked(case, tmp_path / "m.onnx"))

    wrong = f"input 1 ('w_dq') is stored as int8 symmetric per-channel (axis {case[-1]})"
    assert found == ({} if case[-1] is None else {"y": f"{wrong}; tensorrt takes int8 symmetric per-channel (axis -1)"})


@needs_builder
@pytest.mark.parametrize("case", STACKED.values(), ids=STACKED)
def test_the_builder_has_its_outputs_last_too(case, tmp_path):
    assert precision_of(stacked(case, tmp_path / "m.onnx")) == ("int8" if case[-1] is None else "fp32")


MOVED_SHAPES = {
    "Reshape": ((2, 2, 4), (2, 8, 64), {"shape": [2, 8]}, {"shape": [2, 8, 8, 8]}),
    "Transpose": ((8, 2), (2, 8, 8, 8), {"perm": [1, 0]}, {"perm": [0, 3, 1, 2]}),
    "Flatten": ((2, 2, 4), None, {"axis": 1}, {}),
    "Squeeze": ((2, 1, 8), (2, 1, 8, 8, 8), {"axes": [1]}, {"axes": [1]}),
    "Unsqueeze": ((8,), (8, 8, 8), {"axes": [0]}, {"axes": [0]}),
    "Identity": ((2, 8), (2, 8, 8, 8), {}, {}),
}
"""Shapes that become those of a product's and of a convolution's input, with what each operator is told."""

MOVED_ACTIVATIONS = [
    (op_type, mover)
    for op_type in ("MatMul", "Gemm", "Conv")
    for mover in MOVED_SHAPES
    if (op_type, mover) != ("Conv", "Flatten")
]


def move(net, mover, value, name, **settings):
    """A mover behind a value; shapes and axes are constants, as the operators of opset 13 have them."""
    constants = [net.constant(f"{name}_{k}", np.array(v)) for k, v in settings.items() if k in ("shape", "axes")]
    attributes = {k: v for k, v in settings.items() if k not in ("shape", "axes")}
    return net.node(mover, [value, *constants], name, **attributes)


def moved_activation(op_type, mover, path):
    """x ─► Q ─► DQ ─► mover ─► operator(DQ'd weight) ─► y."""
    net, convolves = Net(), op_type == "Conv"
    flat, image, settings, for_image = MOVED_SHAPES[mover]
    x = move(net, mover, net.pair("x"), "moved", **(for_image if convolves else settings))
    net.node(op_type, [x, net.stored("w", WEIGHTS[op_type], axis=0 if convolves else 1)], "y")
    return net.save(path, shape=image if convolves else flat)


@pytest.mark.parametrize(("op_type", "mover"), MOVED_ACTIVATIONS)
def test_a_mover_before_a_product_is_no_trap(op_type, mover, tmp_path):
    assert said(moved_activation(op_type, mover, tmp_path / "m.onnx")) == {}


@needs_builder
@pytest.mark.parametrize(("op_type", "mover"), MOVED_ACTIVATIONS)
def test_the_builder_quantizes_through_a_mover(op_type, mover, tmp_path):
    assert precision_of(moved_activation(op_type, mover, tmp_path / "m.onnx")) == "int8"


def test_movers_in_a_row_and_a_shape_that_is_computed_are_no_trap(tmp_path):
    net = Net()
    turned = move(net, "Transpose", net.pair("x"), "turned", perm=[0, 2, 1])
    rows = net.node("Shape", ["x"], "rows", end=1)
    shape = net.node("Concat", [rows, net.constant("eight", np.array([8]))], "shape", axis=0)
    net.node("Reshape", [turned, shape], "moved")
    net.node("MatMul", ["moved", net.stored("w", (8, 8), axis=1)], "y")
    path = net.save(tmp_path / "m.onnx", shape=(2, 4, 2))

    assert said(path) == {}
    if find_spec("tensorrt_rtx"):
        assert precision_of(path) == "int8"


def test_what_else_reads_a_moved_activation_changes_nothing(tmp_path):
    net = Net()
    move(net, "Reshape", net.pair("x"), "moved", shape=[2, 8])
    net.node("MatMul", ["moved", net.stored("w", (8, 8), axis=1)], "product")
    net.node("Add", ["product", net.node("Relu", ["moved"], "kept")], "y")
    path = net.save(tmp_path / "m.onnx", shape=(2, 2, 4))

    assert said(path) == {}
    if find_spec("tensorrt_rtx"):
        assert precision_of(path, "product") == "int8"


def test_an_operator_that_computes_still_stands_in_the_way(tmp_path):
    net = Net()
    move(net, "Reshape", net.pair("x"), "moved", shape=[2, 8])
    net.node("MatMul", [net.node("Relu", ["moved"], "positive"), net.stored("w", (8, 8), axis=1)], "y")
    path = net.save(tmp_path / "m.onnx", shape=(2, 2, 4))

    assert said(path) == {"y": "input 0 ('positive') is float; tensorrt takes int8 symmetric per-tensor"}
    if find_spec("tensorrt_rtx"):
        assert precision_of(path) == "fp32"


CUT = "it cuts or joins the axis along which its constant 'w_dq' has scales; tensorrt then computes y in float "


def along(axis, taken):
    return {
        "y": f"input 1 ('wm') is stored as int8 symmetric per-channel (axis {axis}); "
        f"tensorrt takes int8 symmetric per-channel (axis {taken})"
    }


TURN = {"perm": [1, 0]}
MOVED_WEIGHTS = {
    "turned, one scale": ("MatMul", "Transpose", (8, 8), None, TURN, {}, {}),
    "turned, MatMul, outputs": ("MatMul", "Transpose", (8, 8), 0, TURN, {}, {}),
    "turned, MatMul, inputs": ("MatMul", "Transpose", (8, 8), -1, TURN, {}, along(0, 1)),
    "turned, Gemm, outputs": ("Gemm", "Transpose", (8, 8), 0, TURN, {}, {}),
    "turned, Gemm, inputs": ("Gemm", "Transpose", (8, 8), 1, TURN, {}, along(0, 1)),
    "turned twice, outputs": ("Gemm", "Transpose", (8, 8), 1, TURN, {"transB": 1}, {}),
    "turned twice, inputs": ("Gemm", "Transpose", (8, 8), 0, TURN, {"transB": 1}, along(1, 0)),
    "turned, Conv, outputs": ("Conv", "Transpose", (3, 3, 8, 8), 3, {"perm": [3, 2, 0, 1]}, {}, {}),
    "turned, Conv, inputs": ("Conv", "Transpose", (3, 3, 8, 8), 2, {"perm": [3, 2, 0, 1]}, {}, along(1, 0)),
    "reshaped, whole": ("MatMul", "Reshape", (2, 4, 8), 2, {"shape": [8, 8]}, {}, {}),
    "reshaped, one scale": ("MatMul", "Reshape", (2, 4, 8), None, {"shape": [8, 8]}, {}, {}),
    "reshaped, inputs": ("MatMul", "Reshape", (8, 2, 4), 0, {"shape": [8, 8]}, {}, along(0, 1)),
    "reshaped, joined": ("MatMul", "Reshape", (2, 4, 8), 1, {"shape": [8, 8]}, {}, {"wm": CUT + "without a word"}),
    "reshaped, cut": ("MatMul", "Reshape", (4, 16), 1, {"shape": [8, 8]}, {}, {"wm": CUT + "without a word"}),
    "reshaped, Conv": ("Conv", "Reshape", (8, 72), 0, {"shape": [8, 8, 3, 3]}, {}, {}),
    "squeezed, outputs": ("MatMul", "Squeeze", (1, 8, 8), 2, {"axes": [0]}, {}, {}),
    "squeezed, inputs": ("MatMul", "Squeeze", (1, 8, 8), 1, {"axes": [0]}, {}, along(0, 1)),
    "unsqueezed, Conv": ("Conv", "Unsqueeze", (8, 8, 3), 0, {"axes": [3]}, {"kernel_shape": [3, 1]}, {}),
}
"""Operator, mover, stored shape, axis of the scales, what mover and operator are told, and what the lint says."""


def moved_weight(case, path):
    """x ─► Q ─► DQ ─► operator(DQ'd weight ─► mover) ─► y."""
    op_type, mover, shape, axis, settings, attributes, _ = case
    net = Net()
    weight = move(net, mover, net.stored("w", shape, axis=axis), "wm", **settings)
    net.node(op_type, [net.pair("x"), weight], "y", **attributes)
    return net.save(path, shape=(2, 8, 8, 8) if op_type == "Conv" else (2, 8))


@pytest.mark.parametrize("case", MOVED_WEIGHTS.values(), ids=MOVED_WEIGHTS)
def test_of_a_moved_weight_the_axis_that_its_scales_come_to_counts(case, tmp_path):
    assert said(moved_weight(case, tmp_path / "m.onnx")) == case[-1]


@needs_builder
@pytest.mark.parametrize("case", MOVED_WEIGHTS.values(), ids=MOVED_WEIGHTS)
def test_the_builder_runs_just_those_in_float_that_are_named(case, tmp_path):
    assert precision_of(moved_weight(case, tmp_path / "m.onnx")) == ("fp32" if case[-1] else "int8")


@needs_builder
def test_a_float_weight_between_a_pair_of_its_own_runs_in_integers(tmp_path):
    net = Net()
    net.constant("w", np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8))
    net.node("MatMul", [net.pair("x"), net.pair("w")], "y")
    path = net.save(tmp_path / "m.onnx", shape=(2, 8))

    assert said(path) == {}
    assert precision_of(path) == "int8"


@needs_builder
def test_a_product_of_two_activations_has_no_weight(tmp_path):
    net = Net()
    net.node("MatMul", [net.pair("x"), net.node("Transpose", ["x_dq"], "turned", **TURN)], "y")
    path = net.save(tmp_path / "m.onnx", shape=(8, 8))
    log = build(library(), path, {}, Options(arch=("sm89",))).layer_log

    assert {layer.node: layer.weights for layer in layers(log, load_graph(path))}["y"] is None


@pytest.mark.parametrize("order", ["casts first", "casts last"])
def test_casts_beside_a_mover_are_named(order, tmp_path):
    net = Net()
    weight = net.stored("w", (8, 8), axis=0)
    weight = weight if order == "casts first" else move(net, "Transpose", weight, "wm", **TURN)
    weight = net.node("Cast", [net.node("Cast", [weight], "half", to=TensorProto.FLOAT16)], "whole", to=1)
    weight = weight if order == "casts last" else move(net, "Transpose", weight, "wm", **TURN)
    net.node("MatMul", [net.pair("x"), weight], "y")
    path = net.save(tmp_path / "m.onnx", shape=(2, 8))

    assert said(path) == {
        "half": "it stands between a DequantizeLinear and y; tensorrt then computes in float without a word"
    }
    if find_spec("tensorrt_rtx"):
        assert precision_of(path) == "fp32"


def test_a_turned_weight_may_serve_two_products_and_stand_in_its_own_place(tmp_path):
    net = Net()
    stored = net.stored("w", (8, 8), axis=0)
    turned = move(net, "Transpose", stored, "wm", **TURN)
    first = net.node("Gemm", [net.pair("x"), stored], "first", transB=1)
    second = net.node("MatMul", [net.pair(first), turned], "second")
    net.node("MatMul", [net.pair(second), turned], "y")

    assert said(net.save(tmp_path / "m.onnx", shape=(2, 8))) == {}


def test_blocks_of_four_bits_may_be_turned(tmp_path):
    net = Net()
    net.constants.append(helper.make_tensor("w_int", TensorProto.INT4, (64, 64), np.arange(4096) % 15 - 7))
    net.constant("w_scale", np.full((64, 2), 0.1, np.float32))
    net.node("DequantizeLinear", ["w_int", "w_scale"], "w_dq", axis=1, block_size=32)
    net.node("MatMul", ["x", move(net, "Transpose", "w_dq", "wm", **TURN)], "y")
    path = net.save(tmp_path / "m.onnx", shape=(2, 64), opset=21)

    assert said(path, "int4") == {}
    if find_spec("tensorrt_rtx"):
        assert precision_of(path) == "int4"


def test_the_graph_that_is_checked_keeps_its_movers(tmp_path):
    import onnx_ir as ir

    graph = load_graph(moved_weight(MOVED_WEIGHTS["turned, MatMul, inputs"], tmp_path / "m.onnx"))
    before = ir.to_proto(graph).SerializeToString(deterministic=True)

    assert lint(graph, TensorRT().contract("int8", Options()))
    assert ir.to_proto(graph).SerializeToString(deterministic=True) == before


def test_a_moved_constant_that_no_product_reads_is_named_where_it_is_read(tmp_path):
    net = Net()
    net.node("Mul", [net.pair("x"), move(net, "Transpose", net.stored("w", (8, 2), axis=0), "wm", **TURN)], "y")

    found = said(net.save(tmp_path / "m.onnx", shape=(2, 8)))

    assert found == {"y": "it runs in float, but its constant 'wm' is stored as integers"}


def test_unsigned_activations_are_named_behind_a_mover(tmp_path):
    net = Net()
    x = move(net, "Reshape", net.pair("x", dtype=np.uint8, zero=128), "moved", shape=[2, 8])
    net.node("MatMul", [x, net.stored("w", (8, 8), axis=1)], "y")
    path = net.save(tmp_path / "m.onnx", shape=(2, 2, 4))

    taken = "is stored as uint8 symmetric per-tensor; tensorrt takes int8 symmetric per-tensor"
    assert said(path) == {"y": f"input 0 ('moved') {taken}"}


def attention(path, axis, shape=(64, 192)):
    """x ─► one product for queries, keys and values ─► heads ─► three Gathers ─► softmax(q·kᵀ)·v, as ViTs have it."""
    net = Net()
    weight = net.stored("w", shape, axis=axis)
    net.node("Add", [net.node("MatMul", [net.pair("x"), weight], "qkv"), net.constant("b", np.ones(192, "f"))], "sum")
    net.node("Reshape", ["sum", net.constant("heads", np.array([2, -1, 3, 4, 16]))], "by_head")
    net.node("Transpose", ["by_head"], "parts", perm=[2, 0, 3, 1, 4])
    for index, name in enumerate("qkv"):
        net.node("Gather", ["parts", net.constant(f"{name}_index", np.array(index))], name, axis=0)
    net.node("MatMul", ["q", net.node("Transpose", ["k"], "k_turned", perm=[0, 1, 3, 2])], "scores")
    net.node("MatMul", [net.node("Softmax", ["scores"], "shares"), "v"], "y")
    return net.save(path, shape=(2, 8, 64))


def test_scales_of_queries_keys_and_values_in_one_product_are_named(tmp_path):
    found = said(attention(tmp_path / "m.onnx", axis=1))

    assert found == {
        "qkv": "input 1 ('w_dq') is stored as int8 symmetric per-channel (axis 1); "
        "tensorrt takes int8 symmetric per-tensor"
    }
    assert said(attention(tmp_path / "m.onnx", axis=None)) == {}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("axis", [2, None])
def test_so_are_those_of_a_weight_of_three_dimensions(count, axis, tmp_path):
    path = attention(tmp_path / "m.onnx", axis, (count, 64, 192))

    assert list(said(path)) == ([] if axis is None else ["qkv"])
    if find_spec("tensorrt_rtx"):
        assert precision_of(path, "qkv") == ("int8" if axis is None else "fp32")


@needs_builder
@pytest.mark.parametrize(("axis", "kind"), [(1, "fp32"), (None, "int8")])
def test_the_builder_takes_one_scale_for_queries_keys_and_values(axis, kind, tmp_path):
    assert precision_of(attention(tmp_path / "m.onnx", axis), "qkv") == kind


def test_every_offending_node_is_named_not_the_first_alone(tmp_path):
    net, value = Net(), "x"
    for index in range(3):
        net.pair(value, dtype=np.uint8, zero=128)
        weight = net.stored(f"w{index}", WEIGHTS["Conv"])
        value = net.node("Conv", [f"{value}_dq", weight], f"conv{index}", pads=[1, 1, 1, 1])
    net.pair("conv2", dtype=np.uint8, zero=128)

    found = said(net.save(tmp_path / "m.onnx", output="conv2_dq"))

    assert set(found) == {"conv0", "conv1", "conv2", "conv2_dq"}
    assert found["conv2_dq"] == "'conv2_q' is stored as uint8 symmetric per-tensor; tensorrt takes int8 symmetric"


def test_pairs_around_other_operators_are_checked_too(tmp_path):
    net = Net()
    net.pair("x", dtype=np.uint8)
    net.node("Relu", ["x_dq"], "y")

    assert list(said(net.save(tmp_path / "m.onnx"))) == ["x_dq"]


def test_a_quantized_constant_of_a_float_operator_is_named(tmp_path):
    net = Net()
    net.node("Mul", [net.pair("x"), net.stored("factor", (), axis=None)], "y")

    path = net.save(tmp_path / "m.onnx")

    assert said(path) == {"y": "it runs in float, but its constant 'factor_dq' is stored as integers"}
    if find_spec("tensorrt_rtx"):
        assert "Quantized constant (factor_int) is only allowed before DQ" in refused(path)


def test_a_quantization_without_a_zero_point_means_two_things(tmp_path):
    net = Net()
    net.node("QuantizeLinear", ["x", net.constant("s", np.float32(0.1))], "x_q")
    net.node("DequantizeLinear", ["x_q", "s"], "y")

    found = said(net.save(tmp_path / "m.onnx"))

    assert found["x_q"].startswith("it has no zero point, so it means uint8 to ONNX and int8 to the target")


def test_a_scale_of_another_type_than_its_tensor_is_named(tmp_path):
    net = Net()
    net.node("Cast", ["x"], "half", to=TensorProto.FLOAT16)
    net.pair("half")
    net.node("MatMul", ["half_dq", net.stored("w", (8, 8), axis=1, kind=np.float16)], "y")

    path = net.save(tmp_path / "m.onnx", shape=(2, 8))

    assert said(path, "int8-fp16") == {"half_q": "its scale is FLOAT, and what it quantizes is FLOAT16"}
    if find_spec("tensorrt_rtx"):
        assert "must have same input types" in refused(path)


@pytest.mark.parametrize("op_type", ["QLinearConv", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"])
def test_operators_on_integers_are_named(op_type, tmp_path):
    net = Net()
    net.node(op_type, ["x"], "y")
    graph = helper.make_graph(net.nodes, "net", [helper.make_tensor_value_info("x", 1, (2, 8))], [])
    graph.output.append(helper.make_tensor_value_info("y", 1, (2, 8)))
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)

    assert said(path) == {
        "y": "not QDQ: it computes on integers itself; tensorrt takes float operators between QDQ pairs"
    }


def test_an_old_opset_is_named(tmp_path):
    path = product("Conv", tmp_path / "m.onnx", opset=13)

    assert said(path) == {}
    assert said(path, "int8-fp16") == {"": "the model has opset 13; tensorrt takes 19 to 25"}


def test_what_onnx_runtime_writes_by_default_is_refused_node_by_node(tmp_path):
    """quantize_static with everything at its default: int32 biases and, asked for, unsigned activations."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.rest = iter([{"x": np.random.default_rng(0).standard_normal((2, 8, 8, 8)).astype(np.float32)}])

        def get_next(self):
            return next(self.rest, None)

    rng, net = np.random.default_rng(0), Net()
    for name, source in (("first", "x"), ("second", "first")):
        weight = net.constant(f"{name}_w", rng.standard_normal((8, 8, 3, 3)).astype(np.float32))
        net.node("Conv", [source, weight, net.constant(f"{name}_b", np.ones(8, np.float32))], name, pads=[1] * 4)
    float_model = net.save(tmp_path / "float.onnx", output="second")
    for kind in (QuantType.QUInt8, QuantType.QInt8):
        path = tmp_path / f"{kind}.onnx"
        quantize_static(float_model, path, Reader(), activation_type=kind)

        whats = [(v.node, v.what) for v in lint_of(path)]

        for node in ("first", "second"):
            assert any(n == node and "its bias" in what and "is int32" in what for n, what in whats)
            assert any(n == node and "asymmetric" in what for n, what in whats)
