"""The builder's log, from a sample of TensorRT-RTX 1.7: three builds' lines, as they came."""

from pathlib import Path

import onnx
import pytest
from onnx import helper, numpy_helper

from qdeploy.backends.trt.layer_log import Tensor, layers, parse_layers
from qdeploy.graph import load_graph

SAMPLE = (Path(__file__).parent / "layers_rtx_1_7.log").read_text("utf-8")


@pytest.fixture
def original(tmp_path):
    """The nodes that the sample speaks of, and one that it does not."""
    import numpy as np

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="node_Conv_750"),
        helper.make_node("Relu", ["a"], ["b"], name="node_relu"),
        helper.make_node("MaxPool", ["b"], ["c"], name="node_max_pool2d", kernel_shape=[1, 1]),
        helper.make_node("Conv", ["c", "w"], ["d"], name="node_Conv_762"),
        helper.make_node("Relu", ["d"], ["e"], name="node_relu_3"),
        helper.make_node("Conv", ["e", "w"], ["f"], name="elsewhere"),
        helper.make_node("MatMul", ["f", "m"], ["g"], name="node_MatMul_130"),
        helper.make_node("MatMul", ["g", "m"], ["y"], name="node_Gemm_360"),
    ]
    info = helper.make_tensor_value_info
    weights = [
        numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "w"),
        numpy_helper.from_array(np.ones((4, 4), np.float32), "m"),
    ]
    graph = helper.make_graph(nodes, "n", [info("x", 1, (1, 3, 4, 4))], [info("y", 1, (1, 3, 4, 4))], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "m.onnx")
    return load_graph(tmp_path / "m.onnx")


def test_every_line_is_read():
    found = parse_layers(SAMPLE)

    assert [layer.kind for layer in found] == [
        *(
            "ShapeHostToDevice",
            "cjmp",
            "gemm",
            "correlation",
            "kgen",
            "maxpool",
            "runtime_fusion",
            "correlation",
            "signal",
        )
    ]
    gemm = found[2]
    assert gemm.name == "node_MatMul_130_myl1_32"
    assert gemm.nodes == ("node_MatMul_130", "getitem_DequantizeLinear", "val_130_DequantizeLinear")
    assert (gemm.inputs[0].type, gemm.constants[0].type, gemm.outputs[0].type) == ("int8", "int8", "fp32")
    assert found[5].outputs == (Tensor("int8", 64 * 16 * 16),)


def test_layers_of_the_sample(original):
    found = {layer.node: layer for layer in layers(SAMPLE, original)}

    conv = found["node_Conv_750"]
    assert (conv.precision, conv.inputs, conv.weights, conv.outputs) == ("int8", ("int8",), "int8", ("fp32",))
    assert conv.layer == "node_Conv_750_myl0_2"
    assert found["node_relu"].precision == "fp32"
    assert found["node_relu"].fused_with == ("node_Conv_750",)
    assert found["node_max_pool2d"].precision == "int8"
    assert (found["node_Conv_762"].precision, found["node_Conv_762"].weights) == ("fp16", "fp16")
    assert found["node_relu_3"].layer == found["node_Conv_762"].layer
    assert found["node_MatMul_130"].precision == "int8"


def test_a_product_of_integers_that_are_cast_first_is_float(original):
    found = {layer.node: layer for layer in layers(SAMPLE, original)}

    assert found["node_Gemm_360"].inputs == ("int8", "fp32")
    assert found["node_Gemm_360"].precision == "fp32"


def test_a_node_that_the_log_does_not_name_is_unknown(original):
    (layer,) = (layer for layer in layers(SAMPLE, original) if layer.node == "elsewhere")

    assert (layer.precision, layer.layer, layer.inputs, layer.weights) == ("unknown", "", (), None)


@pytest.mark.parametrize(
    "log",
    [
        "",
        "Layers:\n",
        "Something else entirely",
        SAMPLE.replace("LayerType: gemm", "Kind: gemm"),
        SAMPLE.replace("Metadata:", "Origin:"),
    ],
)
def test_what_cannot_be_read_is_unknown_and_never_int8(log, original):
    found = layers(log, original)

    assert len(found) == 8
    assert {layer.precision for layer in found} == {"unknown"}


def test_a_type_that_is_new_is_unknown(original):
    found = {x.node: x for x in layers(SAMPLE.replace("Datatype: Int8", "Datatype: Int9"), original)}

    assert found["node_Conv_750"].precision != "int8"
    assert found["node_Conv_750"].weights == "unknown"
