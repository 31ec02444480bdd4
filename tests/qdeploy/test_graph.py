"""The questions asked of a graph: reading and writing it, constants, fusion, channels, conditions, stored integers."""

import numpy as np
import pytest

from qdeploy import graph as questions
from qdeploy.affine import IntegerType
from qdeploy.errors import InputError
from qdeploy.model import digest_of_files
from qdeploy.scheme import Condition, PerBlock, PerChannel, PerTensor, Scheme

RANDOM = np.random.default_rng(3)


def floats(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


@pytest.fixture
def graph_of(build):
    """Builds an ONNX file and reads it back."""
    return lambda *args, **kwargs: questions.load_graph(build(*args, **kwargs).path)


def nodes_of(graph):
    return {node.name: node for node in graph.graph}


def test_a_described_model_knows_its_interface_and_its_parameters(build, node):
    from onnx import TensorProto

    nodes = [node("Gather", "table ids", "rows"), node("MatMul", "rows w", "out")]
    weights = {"table": floats(10, 4), "w": floats(4, 3), "unused": np.arange(5)}
    model = build(nodes, {"ids": (["batch", None], TensorProto.INT64)}, {"out": ["batch", None, 3]}, weights)

    assert [str(spec) for spec in model.inputs] == ["ids=int64[batch,ids_1]"]
    assert [str(spec) for spec in model.outputs] == ["out=float32[batch,out_1,3]"]
    assert model.parameters == 10 * 4 + 4 * 3
    assert model.digest == digest_of_files((model.path,))


def test_large_models_keep_their_weights_beside_them(build, node, folder, monkeypatch, run_onnx):
    model = build([node("MatMul", "x w", "out")], {"x": [2, 50]}, {"out": [2, 50]}, {"w": floats(50, 50)})
    monkeypatch.setattr(questions, "EXTERNAL_DATA_BYTES", 50 * 50 * 4 - 1)
    path = folder() / "big.onnx"

    questions.save_graph(questions.load_graph(model.path), path)

    data = path.with_name("big.onnx.data")
    assert data.stat().st_size == 50 * 50 * 4
    described = questions.describe(path, "big", {})
    assert described.digest == digest_of_files((path, data))
    inputs = {"x": floats(2, 50)}
    np.testing.assert_array_equal(run_onnx(path, inputs)["out"], run_onnx(model.path, inputs)["out"])
    data.write_bytes(data.read_bytes()[:-1] + b"!")
    assert questions.describe(path, "big", {}).digest != described.digest


def test_a_small_model_takes_its_external_weights_in(build, node, folder, monkeypatch, run_onnx):
    model = build([node("MatMul", "x w", "out")], {"x": [2, 50]}, {"out": [2, 50]}, {"w": floats(50, 50)})
    with monkeypatch.context() as patch:
        patch.setattr(questions, "EXTERNAL_DATA_BYTES", 1)
        beside = folder() / "beside.onnx"
        questions.save_graph(questions.load_graph(model.path), beside)

    whole = folder() / "whole.onnx"
    questions.save_graph(questions.load_graph(beside), whole)

    assert list(whole.parent.iterdir()) == [whole]
    inputs = {"x": floats(2, 50)}
    np.testing.assert_array_equal(run_onnx(whole, inputs)["out"], run_onnx(model.path, inputs)["out"])


@pytest.mark.parametrize("limit", [1, 1 << 30])
def test_a_model_can_be_written_over_itself(build, node, monkeypatch, run_onnx, limit):
    model = build([node("MatMul", "x w", "out")], {"x": [2, 50]}, {"out": [2, 50]}, {"w": floats(50, 50)})
    inputs = {"x": floats(2, 50)}
    expected = run_onnx(model.path, inputs)["out"]
    with monkeypatch.context() as patch:
        patch.setattr(questions, "EXTERNAL_DATA_BYTES", 1)
        questions.save_graph(questions.load_graph(model.path), model.path)
    monkeypatch.setattr(questions, "EXTERNAL_DATA_BYTES", limit)

    questions.save_graph(questions.load_graph(model.path), model.path)

    np.testing.assert_array_equal(run_onnx(model.path, inputs)["out"], expected)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"There is no model file .*absent.onnx. Check the path."):
        questions.load_graph(tmp_path / "absent.onnx")


def test_a_folder_is_no_model(tmp_path):
    with pytest.raises(InputError, match="is not an ONNX model, or is damaged"):
        questions.load_graph(tmp_path)


@pytest.mark.parametrize("left", [None, 0, 5000])
def test_missing_or_truncated_weights_beside_a_model_are_the_users_to_mend(
    build, node, normal_form, folder, monkeypatch, left
):
    model = build([node("MatMul", "x w", "out")], {"x": [2, 50]}, {"out": [2, 50]}, {"w": floats(50, 50)})
    with monkeypatch.context() as patch:
        patch.setattr(questions, "EXTERNAL_DATA_BYTES", 1)
        path = folder() / "beside.onnx"
        questions.save_graph(questions.load_graph(model.path), path)
    data = path.with_name("beside.onnx.data")
    described = questions.describe(path, "beside", {})
    content = data.read_bytes()
    data.unlink() if left is None else data.write_bytes(content[:left])

    with pytest.raises(InputError, match=r"beside\.onnx"):
        normal_form(described)
    with pytest.raises(InputError, match=r"beside\.onnx"):
        questions.describe(path, "beside", {})


def test_an_input_with_a_default_is_no_constant(graph_of, node):
    model = graph_of(
        [node("MatMul", "x w", "out")],
        {"x": [1, 2]},
        {"out": [1, 2]},
        {"w": floats(2, 2)},
        weights_as_inputs=True,
    )

    assert questions.constant(model.graph.initializers["w"]) is None
    assert questions.weight_of(nodes_of(model)["out"]) is None


def test_the_weight_is_the_constant_second_input(graph_of, node):
    w = floats(4, 4)
    nodes = [
        node("MatMul", "x w", "constant"),
        node("MatMul", "constant x", "computed"),
        node("MatMul", "computed v", "vector"),
        node("Add", "vector v", "out"),
    ]
    found = nodes_of(graph_of(nodes, {"x": [4, 4]}, {"out": [4]}, {"w": w, "v": floats(4)}))

    np.testing.assert_array_equal(questions.weight_of(found["constant"]), w)
    assert all(questions.weight_of(found[name]) is None for name in ("computed", "vector", "out"))


def test_a_bias_is_the_third_input_or_the_add_behind_a_matmul(graph_of, node):
    nodes = [
        node("Conv", "x k b", "conv"),
        node("Conv", "conv k", "bare"),
        node("Reshape", "bare shape", "flat"),
        node("MatMul", "flat w", "before"),
        node("Add", "c before", "after"),
        node("MatMul", "after w", "twice"),
        node("Add", "twice c", "one"),
        node("Add", "twice one", "out"),
    ]
    weights = {"k": floats(2, 2, 1, 1), "b": floats(2), "w": floats(4, 4), "c": floats(4), "shape": np.array([-1, 4])}
    found = nodes_of(graph_of(nodes, {"x": [1, 2, 2, 2]}, {"out": [2, 4]}, weights))

    assert questions.bias_input(found["conv"]) == (found["conv"], 2)
    assert questions.bias_input(found["bare"]) is None
    assert questions.bias_input(found["before"]) == (found["after"], 0)
    assert questions.bias_input(found["twice"]) is None


def test_the_sole_consumer_of_a_value(graph_of, node):
    nodes = [node("Relu", "x", "a"), node("Relu", "a", "b"), node("Add", "b b", "c"), node("Relu", "c", "d")]
    found = nodes_of(graph_of(nodes, {"x": [2]}, {"c": [2], "d": [2]}))

    assert questions.sole_consumer(found["a"].outputs[0]) is found["b"]
    assert questions.sole_consumer(found["b"].outputs[0]) is None
    assert questions.sole_consumer(found["c"].outputs[0]) is None


@pytest.mark.parametrize(
    ("limits", "bounds", "fused"),
    [
        ("low high", (-1.0, 6.0), True),
        ("low", (-1.0, float("inf")), True),
        ("- high", (float("-inf"), 6.0), True),
        ("half high", (0.5, 6.0), False),
        ("", (float("-inf"), float("inf")), True),
    ],
)
def test_a_clip_is_fused_if_its_interval_contains_zero(graph_of, node, limits, bounds, fused):
    weights = {"w": floats(2, 2), "low": np.float32(-1), "high": np.float32(6), "half": np.float32(0.5)}
    nodes = [node("MatMul", "x w", "y"), node("Clip", f"y {limits}", "out")]
    found = nodes_of(graph_of(nodes, {"x": [1, 2]}, {"out": [1, 2]}, weights))

    assert questions.activation_bounds(found["out"]) == bounds
    assert (questions.fused_activation(found["y"]) is found["out"]) == fused
    assert questions.result_of(found["y"]).name == ("out" if fused else "y")


def test_a_clip_with_computed_limits_is_not_fused(graph_of, node):
    nodes = [node("MatMul", "x w", "y"), node("ReduceMax", "x", "top", keepdims=0), node("Clip", "y - top", "out")]
    found = nodes_of(graph_of(nodes, {"x": [1, 2]}, {"out": [1, 2]}, {"w": floats(2, 2)}))

    assert questions.fused_activation(found["y"]) is None


def test_relu_is_fused_only_into_what_it_alone_reads(graph_of, node):
    nodes = [
        node("MatMul", "x w", "a"),
        node("Relu", "a", "b"),
        node("Relu", "b", "c"),
        node("MatMul", "c w", "d"),
        node("Relu", "d", "e"),
        node("Add", "d e", "out"),
    ]
    found = nodes_of(graph_of(nodes, {"x": [1, 2]}, {"out": [1, 2]}, {"w": floats(2, 2)}))

    assert questions.fused_activation(found["a"]) is found["b"]
    assert questions.fused_activation(found["b"]) is None
    assert questions.fused_activation(found["d"]) is None


def test_channels_run_along_the_axis_of_the_operator(graph_of, node):
    weights = {"k": floats(4, 4, 1, 1), "w": floats(4, 4), "shape": np.array([4, 4])}
    nodes = [
        node("Conv", "x k", "conv"),
        node("ConvTranspose", "conv k", "transposed"),
        node("Reshape", "transposed shape", "flat"),
        node("Gemm", "flat w", "gemm"),
        node("Gemm", "gemm w", "gemm t", transB=1, name="gemm t"),
        node("Gemm", "gemm w", "from the left", transA=1, name="from the left"),
        node("MatMul", "gemm w", "out"),
    ]
    for item in nodes[4:6]:
        item.output[:] = [item.name.replace(" ", "_")]
    found = nodes_of(graph_of(nodes, {"x": [1, 4, 2, 2]}, {"out": [4, 4]}, weights))

    def axes(name):
        node = found[name]
        return (
            questions.input_channel_axis(node),
            questions.weight_channel_axis(node),
            questions.output_channel_axis(node),
        )

    assert axes("conv") == (1, 0, 1)
    assert axes("transposed") == (1, 1, 1)
    assert axes("gemm") == (-1, 1, -1)
    assert axes("gemm t") == (-1, 0, -1)
    assert axes("from the left") == (0, 1, -1)
    assert axes("out") == (-1, -1, -1)
    assert questions.input_channel_axis(found["flat"]) is None


def test_observed_are_the_inputs_and_results_of_quantizable_operators(graph_of, node):
    nodes = [
        node("Conv", "x k", "y"),
        node("Relu", "y", "z"),
        node("Shape", "z", "size"),
        node("Reshape", "z shape", "rows"),
        node("MatMul", "rows w", "product"),
        node("Cos", "product", "cosine"),
        node("Add", "product c", "out"),
    ]
    weights = {"k": floats(4, 3, 1, 1), "w": floats(4, 4), "c": floats(4), "shape": np.array([-1, 4])}
    outputs = {"out": [4, 4], "cosine": [4, 4]}
    model = graph_of(nodes, {"x": [1, 3, 2, 2]}, outputs, weights)
    from onnx_ir.passes.common import ShapeInferencePass

    ShapeInferencePass()(model)

    assert questions.observed_tensors(model) == {"x": 1, "z": 1, "rows": -1, "product": -1, "out": None}
    assert list(questions.observed_tensors(model)) == ["x", "z", "rows", "product", "out"]


@pytest.mark.parametrize(
    ("group", "shape", "depthwise"),
    [(4, (4, 1, 1, 1), True), (1, (4, 4, 1, 1), False), (2, (4, 2, 1, 1), False), (4, (8, 1, 1, 1), False)],
)
def test_depthwise_convolution(graph_of, node, group, shape, depthwise):
    nodes = [node("Conv", "x k", "y", group=group)]
    found = nodes_of(graph_of(nodes, {"x": [1, 4, 2, 2]}, {"y": [1, shape[0], 2, 2]}, {"k": floats(*shape)}))

    assert questions.holds(Condition.DEPTHWISE, found["y"], frozenset()) == depthwise


def test_conditions_on_weights_and_outputs(graph_of, node):
    nodes = [
        node("Gemm", "x w", "a", transB=1),
        node("Gemm", "a w", "b"),
        node("Relu", "b", "c"),
        node("Gemm", "c a", "d", transB=1),
    ]
    model = graph_of(nodes, {"x": [4, 4]}, {"c": [4, 4], "d": [4, 4]}, {"w": floats(4, 4)})
    found = nodes_of(model)

    def holding(condition):
        return {name for name, node in found.items() if questions.holds(condition, node, frozenset())}

    assert holding(Condition.CONSTANT_WEIGHT) == {"a", "b"}
    assert holding(Condition.TRANSPOSED_B) == {"a"}
    assert holding(Condition.GRAPH_OUTPUT) == {"d"}


def test_conditions_on_the_size_of_constants(graph_of, node):
    nodes = [
        node("MatMul", "x w", "a"),
        node("Gemm", "a v", "b", transB=1),
        node("Gather", "t i", "c"),
        node("Gather", "t i", "d", axis=1),
        node("Gather", "x i", "e"),
    ]
    weights = {"w": floats(64, 48), "v": floats(5, 48), "t": floats(7, 64), "i": np.array([0])}
    outputs = {"b": [2, 5], "c": [1, 64], "d": [7, 1], "e": [1, 64]}
    model = graph_of(nodes, {"x": [2, 64]}, outputs, weights)
    found = nodes_of(model)

    def holding(condition):
        return {name for name, node in found.items() if questions.holds(condition, node, frozenset())}

    assert holding(Condition.EVEN_OUTPUTS) == {"a"}
    assert holding(Condition.BLOCKS_OF_16) == {"a", "b", "c", "d"}
    assert holding(Condition.BLOCKS_OF_32) == {"a", "c", "d"}
    assert holding(Condition.BLOCKS_OF_64) == set()
    assert holding(Condition.ROWS_OF_MATRIX) == {"c"}


@pytest.mark.parametrize(
    ("behind", "split"),
    [
        ("a, b, y = Split <num_outputs=3> (p)", True),
        (
            "s = Add (p, c)\nr = Reshape (s, h)\nt = Transpose <perm=[1,0]> (r)\na, b, y = Split <num_outputs=3> (t)",
            True,
        ),
        ("a = Gather (p, i)\nb = Gather (p, j)\ny = Mul (a, b)", True),
        ("n = Shape (p)\na, b, y = Split <num_outputs=3> (p)", True),
        ("y = Gather (p, i)", False),
        ("s = Add (p, x)\na, b, y = Split <num_outputs=3> (s)", False),
        ("y = Relu (p)", False),
        ("r = Relu (p)\na, b, t = Split <num_outputs=3> (p)\ny = Mul (r, p)", False),
    ],
)
def test_a_product_that_is_read_in_parts(behind, split):
    import onnx_ir as ir
    from onnx import parser

    weights = "float[6,6] w, float[6] c = {1, 2, 3, 4, 5, 6}, int64[2] h = {6, 6}, int64 i = {1}, int64 j = {2}"
    text = f"net (float[6,6] x) => (float[n,m] y) <{weights}> {{ p = MatMul (x, w)\n{behind} }}"
    model = ir.from_proto(parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}'))

    assert questions.holds(Condition.SPLIT_RESULT, model.graph[0], frozenset()) == split


def test_between_quantized_asks_for_all_computed_inputs(graph_of, node):
    nodes = [node("Add", "x y", "sum"), node("Add", "sum c", "shifted"), node("Add", "c c", "folded")]
    outputs = {"shifted": [2], "folded": [2]}
    model = graph_of(nodes, {"x": [2], "y": [2]}, outputs, {"c": floats(2)})
    from onnx_ir.passes.common import ShapeInferencePass

    ShapeInferencePass()(model)
    found = nodes_of(model)

    def between(name, *quantized):
        return questions.holds(Condition.BETWEEN_QUANTIZED, found[name], frozenset(quantized))

    assert between("sum", "x", "y")
    assert not between("sum", "x")
    assert between("shifted", "sum")
    assert not between("folded", "x", "y")


STORED = {
    "uint8": (np.uint8, 0.1, np.uint8(3), {}, Scheme(IntegerType(8, signed=False), symmetric=False)),
    "uint8 middle": (np.uint8, 0.1, np.uint8(128), {}, Scheme(IntegerType(8, signed=False), symmetric=True)),
    "int8": (np.int8, 0.1, np.int8(-5), {}, Scheme(IntegerType(8), symmetric=False)),
    "int8 without zero point": (np.int8, 0.1, None, {}, Scheme(IntegerType(8), symmetric=True)),
    "int32": (np.int32, 0.1, np.int32(0), {}, Scheme(IntegerType(32), symmetric=True)),
    "channels": (np.int8, [0.1, 0.2], np.zeros(2, np.int8), {"axis": 0}, Scheme(IntegerType(8), True, PerChannel(0))),
    "default axis": (np.int8, [0.1, 0.2], np.zeros(2, np.int8), {}, Scheme(IntegerType(8), True, PerChannel(1))),
    "one channel": (np.int8, [0.1], np.zeros(1, np.int8), {"axis": 0}, Scheme(IntegerType(8), True, PerTensor())),
}


@pytest.mark.parametrize("case", STORED)
def test_how_a_value_is_stored(graph_of, node, case):
    from onnx import TensorProto, helper

    dtype, scale, zero_point, attributes, expected = STORED[case]
    size = np.size(scale)
    weights = {"scale": np.array(scale, np.float32)} | ({} if zero_point is None else {"zero": zero_point})
    names = "q scale" if zero_point is None else "q scale zero"
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    shape = [max(size, 2), max(size, 2)] if size > 1 else [size, 3]
    model = graph_of(
        [node("DequantizeLinear", names, "x", **attributes)],
        {"q": (shape, kind)},
        {"x": (shape, TensorProto.FLOAT)},
        weights,
    )

    assert questions.stored_scheme(model.graph.outputs[0]) == expected
    assert questions.stored_scheme(model.graph.inputs[0]) is None


def test_blocks_are_read_off_too(graph_of, node):
    from onnx import TensorProto

    weights = {"scale": floats(2, 4)}
    model = graph_of(
        [node("DequantizeLinear", "q scale", "x", axis=0, block_size=32)],
        {"q": ([64, 4], TensorProto.INT8)},
        {"x": [64, 4]},
        weights,
        opset=21,
    )

    assert questions.stored_scheme(model.graph.outputs[0]) == Scheme(IntegerType(8), True, PerBlock(32, 0))


@pytest.mark.parametrize(
    ("op_type", "names"), [("QuantizeLinear", "x scale"), ("DynamicQuantizeLinear", "x"), ("Relu", "x")]
)
def test_quantized_operators_are_found(graph_of, node, op_type, names):
    from onnx import TensorProto

    outputs = "y s z" if op_type == "DynamicQuantizeLinear" else "y"
    kind = TensorProto.FLOAT if op_type == "Relu" else TensorProto.UINT8
    weights = {"scale": np.float32(0.1)} if "scale" in names else {}
    model = graph_of([node(op_type, names, outputs)], {"x": [2]}, {"y": ([2], kind)}, weights)

    assert questions.is_quantized(model) == (op_type != "Relu")


def test_a_folder_given_as_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not an ONNX model, or is damaged"):
        questions.require_sound(tmp_path)


def test_a_file_that_git_has_not_fetched_is_recognised(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")

    with pytest.raises(InputError, match=r"It is a pointer of Git LFS: git lfs pull fetches the model\."):
        questions.require_sound(path)


def test_an_output_without_a_shape_is_refused_with_what_gives_it_one(build, node):
    import onnx

    model = build([node("Relu", "x", "y")], {"x": [1, 3]}, {"y": [1, 3]})
    proto = onnx.load(model.path)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(proto, model.path)

    with pytest.raises(InputError, match=r"Give its inputs and outputs shapes: onnx\.shape_inference\.infer_shapes"):
        questions.require_sound(model.path)
