"""The normal form: the same outputs, one opset, BatchNorm folded, names kept and made unique."""

import numpy as np
import pytest

from qdeploy import graph as questions
from qdeploy.errors import InputError
from qdeploy.model import FloatModel
from qdeploy.prepare import OPSET

RANDOM = np.random.default_rng(5)


def floats(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def batch_norm(channels):
    """γ, β, μ and σ², with variances away from zero."""
    return {
        "gamma": floats(channels),
        "beta": floats(channels),
        "mean": floats(channels),
        "variance": (0.5 + floats(channels) ** 2).astype(np.float32),
    }


def operators(model):
    return [node.op_type for node in questions.load_graph(model.path).graph]


def assert_same_outputs(run_onnx, before, after, inputs, tolerance=1e-5):
    expected = run_onnx(before.path, inputs)
    found = run_onnx(after.path, inputs)
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=tolerance, atol=tolerance)


NORMED = {
    "conv": ("Conv", "x w b", {"pads": [1, 1, 1, 1]}, (4, 3, 3, 3), 4),
    "conv without bias": ("Conv", "x w", {"strides": [2, 2]}, (4, 3, 3, 3), 4),
    "grouped conv": ("Conv", "x w b", {"group": 3}, (6, 1, 3, 3), 6),
    "transposed conv": ("ConvTranspose", "x w b", {"strides": [2, 2]}, (3, 4, 2, 2), 4),
    "grouped transposed conv": ("ConvTranspose", "x w b", {"group": 3}, (3, 2, 3, 3), 6),
}


@pytest.mark.parametrize("opset", range(11, 21))
@pytest.mark.parametrize("case", NORMED)
def test_batch_norm_is_folded_into_the_convolution(build, node, normal_form, run_onnx, case, opset):
    op_type, inputs, attributes, shape, channels = NORMED[case]
    nodes = [
        node(op_type, inputs, "y", **attributes),
        node("BatchNormalization", "y gamma beta mean variance", "z", epsilon=1e-3),
        node("Relu", "z", "out"),
    ]
    weights = {"w": floats(*shape), **batch_norm(channels)} | ({"b": floats(channels)} if "b" in inputs.split() else {})
    model = build(nodes, {"x": [2, 3, 8, 8]}, {"out": [2, channels, "h", "w"]}, weights, opset=opset)

    prepared = normal_form(model)

    assert operators(prepared) == [op_type, "Relu"]
    assert questions.load_graph(prepared.path).opset_imports[""] == OPSET
    assert_same_outputs(run_onnx, model, prepared, {"x": floats(2, 3, 8, 8)})


@pytest.mark.parametrize("opset", [11, 13, 17, 20])
@pytest.mark.parametrize(
    "attributes",
    [{}, {"transB": 1}, {"alpha": 0.5, "beta": 2.0}, {"transB": 1, "alpha": 3.0}],
    ids=["plain", "transposed", "scaled", "transposed and scaled"],
)
def test_batch_norm_is_folded_into_gemm(build, node, normal_form, run_onnx, attributes, opset):
    nodes = [
        node("Gemm", "x w b", "y", **attributes),
        node("BatchNormalization", "y gamma beta mean variance", "out"),
    ]
    shape = (5, 7) if attributes.get("transB") else (7, 5)
    weights = {"w": floats(*shape), "b": floats(5), **batch_norm(5)}
    model = build(nodes, {"x": [3, 7]}, {"out": [3, 5]}, weights, opset=opset)

    prepared = normal_form(model)

    assert operators(prepared) == ["Gemm"]
    assert_same_outputs(run_onnx, model, prepared, {"x": floats(3, 7)})


@pytest.mark.parametrize("shape", [None, (5,), (1,), (1, 5), (), (3, 5), (3, 1)], ids=str)
@pytest.mark.parametrize(
    "factors", [{}, {"alpha": 0.5, "beta": 3.0}, {"beta": 0.0}, {"transB": 1, "alpha": 2.0}], ids=str
)
def test_factors_of_gemm_are_folded_into_its_constants(build, node, normal_form, run_onnx, factors, shape):
    weights = {"w": floats(5, 4) if "transB" in factors else floats(4, 5)}
    weights |= {} if shape is None else {"c": np.float32(floats(*shape))}
    names = "x w" if shape is None else "x w c"
    model = build([node("Gemm", names, "out", **factors)], {"x": [3, 4]}, {"out": [3, 5]}, weights)

    prepared = normal_form(model)

    graph = questions.load_graph(prepared.path).graph
    row_by_row = shape in ((3, 5), (3, 1))
    assert set(graph[0].attributes) <= ({"transB", "beta"} if row_by_row else {"transB"})
    assert set(graph.initializers) == set(weights)
    assert shape is None or tuple(graph.initializers["c"].shape) == (shape if row_by_row else (5,))
    assert_same_outputs(run_onnx, model, prepared, {"x": floats(3, 4)})


def test_constants_that_others_read_keep_their_values(build, node, normal_form, run_onnx):
    nodes = [node("Gemm", "x w c", "y", alpha=2.0, beta=0.5), node("Gemm", "y w c", "z"), node("Add", "z c", "out")]
    model = build(nodes, {"x": [3, 4]}, {"out": [3, 4]}, {"w": floats(4, 4), "c": floats(4)})

    assert_same_outputs(run_onnx, model, normal_form(model), {"x": floats(3, 4)})


def test_batch_norm_stays_where_the_convolution_is_read_by_others(build, node, normal_form, run_onnx):
    nodes = [
        node("Conv", "x w", "y"),
        node("BatchNormalization", "y gamma beta mean variance", "z"),
        node("Add", "y z", "out"),
    ]
    model = build(nodes, {"x": [1, 3, 6, 6]}, {"out": [1, 4, 4, 4]}, {"w": floats(4, 3, 3, 3), **batch_norm(4)})

    prepared = normal_form(model)

    assert operators(prepared) == ["Conv", "BatchNormalization", "Add"]
    assert_same_outputs(run_onnx, model, prepared, {"x": floats(1, 3, 6, 6)})


def test_two_convolutions_with_one_weight_keep_their_own_batch_norms(build, node, normal_form, run_onnx):
    second = {f"{name}2": array for name, array in batch_norm(3).items()}
    nodes = [
        node("Conv", "x w", "y"),
        node("BatchNormalization", "y gamma beta mean variance", "z"),
        node("Conv", "z w", "y2"),
        node("BatchNormalization", "y2 gamma2 beta2 mean2 variance2", "out"),
    ]
    weights = {"w": floats(3, 3, 1, 1), **batch_norm(3), **second}
    model = build(nodes, {"x": [1, 3, 4, 4]}, {"out": [1, 3, 4, 4]}, weights)

    assert_same_outputs(run_onnx, model, normal_form(model), {"x": floats(1, 3, 4, 4)})


def test_weights_listed_as_inputs_are_constants_all_the_same(build, node, normal_form, run_onnx):
    nodes = [node("Conv", "x w", "y"), node("BatchNormalization", "y gamma beta mean variance", "out")]
    weights = {"w": floats(4, 3, 1, 1), **batch_norm(4)}
    shapes = {"x": [1, 3, 4, 4]}, {"out": [1, 4, 4, 4]}
    model = build(nodes, *shapes, weights, opset=11, weights_as_inputs=True)

    prepared = normal_form(model)

    assert [spec.name for spec in prepared.inputs] == ["x"]
    assert operators(prepared) == ["Conv"]
    assert_same_outputs(run_onnx, model, prepared, {"x": floats(1, 3, 4, 4)})


def test_tensor_names_and_output_names_are_kept(build, node, normal_form):
    nodes = [
        node("Conv", "image stem.weight", "stem/conv"),
        node("BatchNormalization", "stem/conv gamma beta mean variance", "stem/norm"),
        node("Relu", "stem/norm", "features"),
        node("GlobalAveragePool", "features", "pooled"),
        node("Flatten", "pooled", "flat"),
        node("Gemm", "flat head.weight", "logits"),
    ]
    weights = {"stem.weight": floats(4, 3, 3, 3), "head.weight": floats(4, 2), **batch_norm(4)}
    outputs = {"features": [1, 4, 6, 6], "logits": [1, 2]}
    model = build(nodes, {"image": [1, 3, 8, 8]}, outputs, weights, opset=13)

    prepared = normal_form(model)

    names = {value.name for node in questions.load_graph(prepared.path).graph for value in node.outputs}
    assert (prepared.inputs, prepared.outputs) == (model.inputs, model.outputs)
    assert names == {"stem/norm", "features", "pooled", "flat", "logits"}


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [[2, 3], [-1, -2], [3, 2], [-2, 3]])
@pytest.mark.parametrize("opset", [13, 20])
def test_a_spatial_mean_becomes_global_average_pooling(build, node, normal_form, run_onnx, axes, keepdims, opset):
    as_input = opset >= 18
    mean = (
        node("ReduceMean", "y axes", "z", keepdims=keepdims)
        if as_input
        else node("ReduceMean", "y", "z", axes=axes, keepdims=keepdims)
    )
    shape = ["n", 4, 1, 1] if keepdims else ["n", 4]
    weights = {"w": floats(4, 3, 3, 3)} | ({"axes": np.array(axes)} if as_input else {})
    nodes = [node("Conv", "x w", "y"), mean, node("Sigmoid", "z", "out")]
    model = build(nodes, {"x": ["n", 3, 7, 9]}, {"out": shape}, weights, opset=opset)

    prepared = normal_form(model)

    assert "ReduceMean" not in operators(prepared)
    assert operators(prepared).count("GlobalAveragePool") == 1
    assert prepared.outputs == model.outputs
    assert_same_outputs(run_onnx, model, prepared, {"x": floats(2, 3, 7, 9)})


@pytest.mark.parametrize("keepdims", [0, 1])
def test_a_spatial_mean_that_is_an_output_keeps_its_name(build, node, normal_form, run_onnx, keepdims):
    nodes = [node("ReduceMean", "x axes", "mean", keepdims=keepdims)]
    shape = [2, 3, 1, 1] if keepdims else [2, 3]
    model = build(nodes, {"x": [2, 3, 5, 5]}, {"mean": shape}, {"axes": np.array([2, 3])})

    prepared = normal_form(model)

    assert prepared.outputs == model.outputs
    assert operators(prepared)[0] == "GlobalAveragePool"
    assert_same_outputs(run_onnx, model, prepared, {"x": floats(2, 3, 5, 5)})


@pytest.mark.parametrize(
    ("shape", "axes", "result"),
    [([2, 3, 5], [1, 2], [2, 1, 1]), ([2, 3, 5, 5], [1, 2], [2, 1, 1, 5]), ([2, 3, 4, 5, 5], [2, 3], [2, 3, 1, 1, 5])],
)
def test_other_means_stay(build, node, normal_form, run_onnx, shape, axes, result):
    model = build([node("ReduceMean", "x axes", "out")], {"x": shape}, {"out": result}, {"axes": np.array(axes)})

    prepared = normal_form(model)

    assert operators(prepared) == ["ReduceMean"]
    assert_same_outputs(run_onnx, model, prepared, {"x": floats(*shape)})


@pytest.mark.parametrize("window", [(2, 640, 640, 0), (8, 3, 2, 0), (7, 3, 3, 1), (6, 2, 2, 0)])
def test_windows_that_stick_out_are_averaged_as_torch_does(build, node, normal_form, run_onnx, window):
    import torch

    size, kernel, stride, pad = window
    x = floats(2, 3, size, size)
    with_ceil = {"ceil_mode": True, "count_include_pad": False}
    expected = torch.nn.functional.avg_pool2d(torch.from_numpy(x), kernel, stride, pad, **with_ceil).numpy()
    settings = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4, "ceil_mode": 1}
    nodes = [node("AveragePool", "x", "pooled", **settings), node("Identity", "pooled", "out")]
    model = build(nodes, {"x": [2, 3, size, size]}, {"out": list(expected.shape)}, {})

    prepared = normal_form(model)

    pool = next(n for n in questions.load_graph(prepared.path).graph if n.op_type == "AveragePool")
    assert pool.attributes.get_int("ceil_mode", 0) == 0
    np.testing.assert_allclose(run_onnx(prepared.path, {"x": x})["out"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["int32", "double"])
def test_a_mean_of_other_numbers_than_float32_stays(build, node, normal_form, run_onnx, kind):
    from onnx import TensorProto

    element = {"int32": TensorProto.INT32, "double": TensorProto.DOUBLE}[kind]
    model = build(
        [node("ReduceMean", "x axes", "out")],
        {"x": ([1, 2, 4, 4], element)},
        {"out": ([1, 2, 1, 1], element)},
        {"axes": np.array([2, 3])},
    )

    prepared = normal_form(model)

    array = RANDOM.integers(-9, 9, (1, 2, 4, 4)).astype(np.dtype(kind))
    assert_same_outputs(run_onnx, model, prepared, {"x": array})


def torch_model(folder):
    import torch

    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, bias=False),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU6(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 2),
    ).eval()
    module[1].running_mean.normal_()
    path = folder / "torch.onnx"
    torch.onnx.export(module, (torch.zeros(1, 3, 8, 8),), path, dynamo=True, verbose=False, input_names=["image"])
    return questions.describe(path, "torch", {})


def test_a_torch_export_is_folded_and_forgets_where_it_was_made(folder, normal_form, run_onnx):
    model = torch_model(folder())

    prepared = normal_form(model)

    content = prepared.path.read_bytes()
    assert operators(prepared)[:3] == ["Conv", "Clip", "GlobalAveragePool"]
    assert b".py" not in content
    assert b"site-packages" not in content
    assert not list(prepared.path.parent.glob("*.data"))
    assert_same_outputs(run_onnx, model, prepared, {"image": floats(1, 3, 8, 8)})


def test_file_paths_in_metadata_are_gone(build, node, normal_form):
    import onnx

    model = build([node("Relu", "x", "out")], {"x": [2]}, {"out": [2]})
    proto = onnx.load(model.path)
    for place in (proto, proto.graph, proto.graph.node[0]):
        place.doc_string = "/home/someone/model.py"
        entry = place.metadata_props.add()
        entry.key, entry.value = "trace", "/home/someone/model.py"
    proto.producer_version = "/home/someone"
    onnx.save(proto, model.path)

    assert b"/home/someone" not in normal_form(model).path.read_bytes()


def test_preparing_twice_gives_the_same_bytes(build, node, normal_form):
    nodes = [
        node("Conv", "x w", "y"),
        node("BatchNormalization", "y gamma beta mean variance", "z"),
        node("Constant", "", "two", value_float=2.0),
        node("Mul", "z two", "m", name=""),
        node("ReduceMean", "m", "r", axes=[2, 3], keepdims=0),
        node("Gemm", "r v", "out", name=""),
    ]
    weights = {"w": floats(4, 3, 3, 3), "v": floats(4, 2), **batch_norm(4)}
    once = normal_form(build(nodes, {"x": ["n", 3, 8, 8]}, {"out": ["n", 2]}, weights, opset=13))

    twice = normal_form(once)

    assert twice.path.read_bytes() == once.path.read_bytes()
    assert twice.digest == once.digest


def test_what_is_constant_is_folded(build, node, normal_form, run_onnx):
    nodes = [
        node("Constant", "", "half", value_float=0.5),
        node("Mul", "w half", "halved"),
        node("MatMul", "x halved", "y"),
        node("Shape", "w", "shape"),
        node("Reshape", "y shape", "out"),
    ]
    model = build(nodes, {"x": [4, 4]}, {"out": [4, 4]}, {"w": floats(4, 4)})

    prepared = normal_form(model)

    graph = questions.load_graph(prepared.path)
    assert "Constant" not in operators(prepared)
    matmul = next(node for node in graph.graph if node.op_type == "MatMul")
    assert questions.weight_of(matmul) is not None
    assert_same_outputs(run_onnx, model, prepared, {"x": floats(4, 4)})


def test_nodes_get_names_of_their_own_and_names_that_are_there_stay(build, node, normal_form):
    nodes = [
        node("Conv", "x w", "a", name="Conv_1"),
        node("Conv", "a w2", "b", name="Conv_0"),
        node("BatchNormalization", "b gamma beta mean variance", "c", name="norm"),
        node("Sigmoid", "c", "d", name="twin"),
        node("Tanh", "d", "e", name="twin"),
        node("Sigmoid", "e", "f", name=""),
        node("Conv", "f w", "out", name="Conv_5"),
    ]
    weights = {"w": floats(3, 3, 1, 1), "w2": floats(3, 3, 1, 1), **batch_norm(3)}
    prepared = normal_form(build(nodes, {"x": [1, 3, 2, 2]}, {"out": [1, 3, 2, 2]}, weights))

    names = [node.name for node in questions.load_graph(prepared.path).graph]
    assert all(names)
    assert len(set(names)) == len(names) == 6
    assert (names[0], names[2], names[5]) == ("Conv_1", "twin", "Conv_5")


def test_a_quantized_model_is_refused(build, node, normal_form):
    nodes = [node("QuantizeLinear", "x scale zero", "q"), node("DequantizeLinear", "q scale zero", "out")]
    model = build(nodes, {"x": [2]}, {"out": [2]}, {"scale": np.float32(0.1), "zero": np.uint8(3)})

    with pytest.raises(InputError, match=r"net.onnx is quantized already. Look at it with qdeploy inspect"):
        normal_form(model)


def test_initializers_of_an_old_file_stop_being_inputs(build, node, normal_form):
    import onnx

    nodes = [node("MatMul", "x w", "out")]
    model = build(nodes, {"x": [1, 4]}, {"out": [1, 3]}, {"w": floats(4, 3)}, opset=11, weights_as_inputs=True)
    old = onnx.load(model.path)
    old.ir_version = 3
    onnx.save(old, model.path)

    prepared = normal_form(model)

    assert [spec.name for spec in prepared.inputs] == ["x"]
    onnx.checker.check_model(onnx.load(prepared.path))


def test_an_old_opset_is_refused(build, node, normal_form):
    model = build([node("Relu", "x", "out")], {"x": [2]}, {"out": [2]}, opset=6)

    with pytest.raises(InputError, match=r"net.onnx has opset 6. Export it with an opset of 7 to 20."):
        normal_form(model)


def test_an_operator_that_cannot_be_converted_is_named(build, node, normal_form):
    nodes = [node("BatchNormalization", "x gamma beta mean variance", "out", spatial=0)]
    model = build(nodes, {"x": [1, 2]}, {"out": [1, 2]}, batch_norm(2), opset=8)

    with pytest.raises(InputError, match=r"net.onnx has opset 8, and ONNX cannot convert it to 20: .*spatial"):
        normal_form(model)


def test_external_data_moves_along(build, node, normal_form, run_onnx, monkeypatch):
    import onnx

    model = build([node("MatMul", "x w", "out")], {"x": [2, 64]}, {"out": [2, 64]}, {"w": floats(64, 64)}, opset=20)
    beside = model.path.with_name("beside.onnx")
    onnx.save(onnx.load(model.path), beside, save_as_external_data=True, location="beside.bin", size_threshold=0)
    external = questions.describe(beside, "net", {})

    inside = normal_form(external)
    monkeypatch.setattr(questions, "EXTERNAL_DATA_BYTES", 100)
    outside = normal_form(external)

    assert sorted(path.name for path in inside.path.parent.iterdir()) == ["model.onnx"]
    assert sorted(path.name for path in outside.path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    inputs = {"x": floats(2, 64)}
    assert_same_outputs(run_onnx, model, inside, inputs)
    assert_same_outputs(run_onnx, model, outside, inputs)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), b"a text file\n" * 9])
def test_a_foreign_file_is_refused(tmp_path, normal_form, content):
    path = tmp_path / "net.onnx"
    path.write_bytes(content)

    with pytest.raises(InputError, match=r"net.onnx is not an ONNX model"):
        normal_form(FloatModel(path, "", "net", (), (), 0))


def test_a_truncated_file_is_refused(build, node, normal_form):
    model = build([node("MatMul", "x w", "out")], {"x": [2, 8]}, {"out": [2, 8]}, {"w": floats(8, 8)})
    content = model.path.read_bytes()
    for length in range(0, len(content), 7):
        model.path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"net\.onnx"):
            normal_form(model)


@pytest.mark.parametrize("op", ["Add", "Sub"])
def test_a_guard_of_a_division_stays_however_small(op, build, node, normal_form, run_onnx):
    """x / (x + 1e-12) is 0 at 0; with the guard taken for zero it would be NaN."""
    nodes = [node(op, "x c", "a"), node("Div", "x a", "y")]
    model = normal_form(build(nodes, {"x": [2]}, {"y": [2]}, {"c": np.array(1e-12, np.float32)}))

    np.testing.assert_allclose(run_onnx(model.path, {"x": np.array([0, 1], np.float32)})["y"], [0, 1], rtol=1e-6)


def test_a_factor_near_one_stays(build, node, normal_form, run_onnx):
    factor = np.array(1.000005, np.float32)
    model = normal_form(build([node("Mul", "x c", "y")], {"x": [1]}, {"y": [1]}, {"c": factor}))

    assert run_onnx(model.path, {"x": np.array([1e6], np.float32)})["y"] == np.float32(1e6) * factor


@pytest.mark.parametrize(
    ("product", "value", "stays"),
    [
        ("Add a c", 0, False),
        ("Add c a", 0, False),
        ("Sub a c", 0, False),
        ("Sub c a", 0, True),
        ("Mul c a", 1, False),
        ("Div a c", 1, False),
        ("Div c a", 1, True),
        ("Mul a c", 0, True),
        ("Add a c", 1, True),
        ("Mul a c", [[[1]]], True),
        ("Mul a c", [1, 1], True),
    ],
)
def test_operands_that_change_nothing_are_dropped(product, value, stays, build, node, normal_form, run_onnx):
    op, inputs = product.split(maxsplit=1)
    constant = np.array(value, np.float32)
    rank = max(2, constant.ndim)
    nodes = [node("Relu", "x", "a"), node(op, inputs, "b"), node("Neg", "b", "y")]
    source = build(nodes, {"x": [2, 2]}, {"y": [1, 2, 2][-rank:]}, {"c": constant})
    model = normal_form(source)

    assert (op in {each.op_type for each in questions.load_graph(model.path).graph}) == stays
    x = {"x": np.array([[1, 2], [3, 4]], np.float32)}
    np.testing.assert_array_equal(run_onnx(model.path, x)["y"], run_onnx(source.path, x)["y"])
