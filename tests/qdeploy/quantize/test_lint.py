import logging

import pytest

from qdeploy.backends.ort_cpu import Options, OrtCpu
from qdeploy.graph import load_graph
from qdeploy.quantize.lint import Violation, lint
from qdeploy.scheme import Condition, OpRule, QuantContract
from tests.contracts.backend_contract import NET, float_model, quantized_model, samples_for

CONTRACT = OrtCpu().contract("int8", Options())
WEIGHTED = ["conv", "depthwise", "pointwise", "classifier"]
SQUARE = "net (float[2,4] x) => (float y) <float[4,4] w, float[4] b> { [gemm] y = Gemm <transB=1> (x, w, b) }"

OURS = {
    "a network": (NET, []),
    "with a node kept float": (NET, ["depthwise"]),
    "with a sum kept float": (NET, ["sum"]),
    "with its ends kept float": (NET, ["first", "last"]),
    "without a weight": ("net (float[2,4] x) => (float y) { [s] y = Softmax (x) }", []),
    "with an operator that runs in float": (
        """net (float[1,3,8,8] x) => (float y) <float[4,3,1,1] w, float[4,4,1,1] t, float[4,4,1,1] v> {
            [c] c = Conv (x, w) [s] s = Softmax (c) [t] u = ConvTranspose (s, t) [v] y = Conv (u, v) }""",
        [],
    ),
    "with products": (
        """net (float[N,S,4] x) => (float y) <float[4,4] w, float[4] b, float[4,4] v> {
            [m] m = MatMul (x, w) [a] a = Add (m, b) [r] r = Relu (a) [v] y = MatMul (r, v) }""",
        [],
    ),
}


def by_another_tool(text, folder, **settings):
    """A network quantized by ONNX Runtime's own quantize_static."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self, samples):
            self.rest = iter(samples)

        def get_next(self):
            return next((sample.inputs for sample in self.rest), None)

    model = float_model(text, folder)
    logging.disable(logging.WARNING)
    try:
        quantize_static(str(model.path), str(folder / "theirs.onnx"), Reader(samples_for(model)), **settings)
    finally:
        logging.disable(logging.NOTSET)
    return load_graph(folder / "theirs.onnx")


def types(**kinds):
    from onnxruntime.quantization import QuantType

    return {f"{what}_type": QuantType[kind] for what, kind in kinds.items()}


def node_named(graph, name):
    return next(node for node in graph.graph if node.name == name)


def set_weight_axis(graph, axis):
    import onnx_ir as ir

    node_named(graph, "gemm").inputs[1].producer().attributes["axis"] = ir.AttrInt64("axis", axis)


@pytest.mark.parametrize(("text", "keep"), OURS.values(), ids=OURS)
def test_our_own_models_keep_the_contract(text, keep, tmp_path):
    quantized = quantized_model(float_model(text, tmp_path), CONTRACT, tmp_path, keep)

    assert lint(load_graph(quantized.path), CONTRACT) == ()


def test_our_own_models_with_one_scale_a_weight_keep_their_contract(tmp_path):
    contract = CONTRACT.with_per_tensor_weights()
    quantized = quantized_model(float_model(NET, tmp_path), contract, tmp_path)

    assert lint(load_graph(quantized.path), contract) == ()


def test_a_float_model_breaks_nothing(tmp_path):
    assert lint(load_graph(float_model(NET, tmp_path).path), CONTRACT) == ()


@pytest.mark.parametrize("settings", [{}, {"per_channel": True}], ids=["per-tensor", "per-channel"])
def test_another_tools_model_can_keep_the_contract(settings, tmp_path):
    graph = by_another_tool(NET, tmp_path, **types(activation="QUInt8", weight="QInt8"), **settings)

    assert lint(graph, CONTRACT) == ()


def test_signed_activations_are_found_at_every_reader(tmp_path):
    graph = by_another_tool(NET, tmp_path, **types(activation="QInt8", weight="QInt8"))

    found = lint(graph, CONTRACT)

    assert [v.node for v in found] == ["conv", "depthwise", "sum", "sum", "pointwise", "pool", "classifier"]
    assert found[0] == Violation(
        "conv",
        "Conv",
        "input 0 ('image_DequantizeLinear_Output') is stored as int8 asymmetric per-tensor; "
        "ort-cpu takes uint8 asymmetric per-tensor",
        next(rule.reason for rule in CONTRACT.rules if rule.op_type == "Conv"),
        "Quantize the float model again for this target: qdeploy quantize.",
    )


def test_quantize_statics_defaults_break_the_contract(tmp_path):
    """Signed activations are its default."""
    assert {v.node for v in lint(by_another_tool(NET, tmp_path), CONTRACT)} >= set(WEIGHTED)


@pytest.mark.parametrize(
    ("settings", "stored"),
    [
        ({"extra_options": {"WeightSymmetric": False}, "weight": "QInt8"}, "int8 asymmetric per-tensor"),
        ({"weight": "QUInt8"}, "uint8 asymmetric per-tensor"),
        ({"weight": "QInt16"}, "int16 symmetric per-tensor"),
    ],
    ids=["asymmetric", "unsigned", "16 bits"],
)
def test_wrong_weights_are_found(settings, stored, tmp_path):
    kinds = types(activation="QUInt8", weight=settings.pop("weight"))

    found = lint(by_another_tool(NET, tmp_path, **kinds, **settings), CONTRACT)

    assert [v.node for v in found] == WEIGHTED
    assert found[0].what == (
        f"input 1 ('w1_DequantizeLinear_Output') is stored as {stored}; "
        "ort-cpu takes int8 symmetric per-channel (axis 0)"
    )


def test_16_bit_activations_are_found(tmp_path):
    found = lint(by_another_tool(NET, tmp_path, **types(activation="QUInt16", weight="QInt8")), CONTRACT)

    assert {v.node for v in found} >= set(WEIGHTED)
    assert "is stored as uint16 asymmetric per-tensor; ort-cpu takes uint8" in found[0].what


def test_scales_along_another_axis_are_found(tmp_path):
    graph = by_another_tool(SQUARE, tmp_path, per_channel=True, **types(activation="QUInt8", weight="QInt8"))
    assert lint(graph, CONTRACT) == ()

    set_weight_axis(graph, 1)

    (found,) = lint(graph, CONTRACT)
    assert found.node == "gemm"
    assert found.what == (
        "input 1 ('w_DequantizeLinear_Output') is stored as int8 symmetric per-channel (axis 1); "
        "ort-cpu takes int8 symmetric per-channel (axis 0)"
    )


def test_an_axis_may_count_from_the_end(tmp_path):
    graph = by_another_tool(SQUARE, tmp_path, per_channel=True, **types(activation="QUInt8", weight="QInt8"))

    set_weight_axis(graph, -2)

    assert lint(graph, CONTRACT) == ()


def test_scales_for_channels_where_one_is_taken_are_found(tmp_path):
    graph = by_another_tool(SQUARE, tmp_path, per_channel=True, **types(activation="QUInt8", weight="QInt8"))

    (found,) = lint(graph, CONTRACT.with_per_tensor_weights())

    assert found.what.endswith("int8 symmetric per-channel (axis 0); ort-cpu takes int8 symmetric per-tensor")


def test_a_float_bias_is_found(tmp_path):
    graph = by_another_tool(
        NET, tmp_path, extra_options={"QuantizeBias": False}, **types(activation="QUInt8", weight="QInt8")
    )

    assert [(v.node, v.what) for v in lint(graph, CONTRACT)] == [
        ("conv", "its bias ('b1') is float; ort-cpu takes it as int32"),
        ("classifier", "its bias ('b4') is float; ort-cpu takes it as int32"),
    ]


def test_an_integer_bias_is_found_where_it_must_be_float(tmp_path):
    rules = CONTRACT.rules
    contract = QuantContract("other", "int8", (13, 25), "float", "inputs-and-outputs", rules)
    graph = by_another_tool(SQUARE, tmp_path, **types(activation="QUInt8", weight="QInt8"))

    assert [v.what for v in lint(graph, contract)] == ["its bias ('b') is int32; other takes it as float"]


def test_a_float_input_beside_an_integer_weight_is_found(tmp_path):
    graph = by_another_tool(NET, tmp_path, **types(activation="QUInt8", weight="QInt8"))
    graph_input = next(iter(graph.graph.inputs))

    node_named(graph, "conv").replace_input_with(0, graph_input)

    assert [(v.node, v.what) for v in lint(graph, CONTRACT)] == [
        ("conv", "input 0 ('image') is float; ort-cpu takes uint8 asymmetric per-tensor")
    ]


def test_an_output_that_is_not_quantized_is_found(tmp_path):
    graph = by_another_tool(
        "net (float[1,3,8,8] x) => (float y) <float[4,3,1,1] w> { [c] c = Conv (x, w) [s] y = Sin (c) }",
        tmp_path,
        extra_options={"OpTypesToExcludeOutputQuantization": ["Conv"]},
        **types(activation="QUInt8", weight="QInt8"),
    )

    assert [(v.node, v.what) for v in lint(graph, CONTRACT)] == [
        ("c", "its output ('c') is not quantized; ort-cpu takes uint8 asymmetric per-tensor")
    ]


def test_a_weight_that_no_rule_quantizes_is_found_with_the_rules_reason_and_cure(tmp_path):
    text = "net (float[1,3,8,8] x) => (float y) <float[3,4,3,3] w> { [up] y = ConvTranspose (x, w) }"
    graph = by_another_tool(text, tmp_path, **types(activation="QUInt8", weight="QInt8"))
    rule = next(rule for rule in CONTRACT.rules if rule.op_type == "ConvTranspose")

    assert lint(graph, CONTRACT) == (
        Violation(
            "up",
            "ConvTranspose",
            "it runs in float, but its weight is stored as int8 symmetric per-tensor",
            rule.reason,
            rule.cure,
        ),
    )


def test_an_operator_without_a_rule_is_found(tmp_path):
    graph = by_another_tool(SQUARE, tmp_path, **types(activation="QUInt8", weight="QInt8"))
    contract = QuantContract("other", "int8", (13, 25), "int32", "inputs")

    (found,) = lint(graph, contract)

    assert (found.node, found.reason) == ("gemm", "other has no rule that quantizes this Gemm.")


def test_depthwise_weights_are_recognised_behind_their_dequantization(tmp_path):
    reason = "Two formats."
    rule = OpRule("Conv", (Condition.DEPTHWISE,), reason=reason)
    contract = QuantContract("other", "int8", (13, 25), "int32", "inputs", (rule, *CONTRACT.rules))
    graph = by_another_tool(NET, tmp_path, **types(activation="QUInt8", weight="QInt8"))

    assert [(v.node, v.reason) for v in lint(graph, contract)] == [("depthwise", reason)]


def test_integer_operators_are_not_qdq(tmp_path):
    from onnxruntime.quantization import QuantFormat

    graph = by_another_tool(
        NET, tmp_path, quant_format=QuantFormat.QOperator, **types(activation="QUInt8", weight="QInt8")
    )

    found = lint(graph, CONTRACT)

    assert {"QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "QGemm"} == {v.op_type for v in found}
    assert found[0].what == ("not QDQ: it computes on integers itself; ort-cpu takes float operators between QDQ pairs")


def test_dynamic_quantization_is_not_qdq(tmp_path):
    from onnxruntime.quantization import quantize_dynamic

    text = "net (float[N,S,4] x) => (float y) <float[4,4] w> { [m] y = MatMul (x, w) }"
    quantize_dynamic(str(float_model(text, tmp_path).path), str(tmp_path / "dynamic.onnx"))

    found = lint(load_graph(tmp_path / "dynamic.onnx"), CONTRACT)

    assert [v.op_type for v in found] == ["DynamicQuantizeLinear", "MatMulInteger"]


@pytest.mark.parametrize("opset", [12, 26])
def test_an_opset_out_of_the_contracts_limits_is_found(opset, tmp_path):
    graph = load_graph(float_model(NET, tmp_path).path)
    graph.opset_imports[""] = opset

    (found,) = lint(graph, CONTRACT)

    assert (found.node, found.what) == ("", f"the model has opset {opset}; ort-cpu takes 13 to 25")


def test_lint_leaves_the_graph_as_it_is(tmp_path):
    import onnx_ir as ir

    graph = by_another_tool(NET, tmp_path)
    before = ir.to_proto(graph).SerializeToString(deterministic=True)

    lint(graph, CONTRACT)

    assert ir.to_proto(graph).SerializeToString(deterministic=True) == before


def test_one_dequantized_weight_may_serve_two_operators(tmp_path):
    text = """net (float[1,4,8,8] x) => (float y) <float[4,4,1,1] w> { [one] a = Conv (x, w) [two] y = Conv (a, w) }"""
    graph = by_another_tool(text, tmp_path, **types(activation="QInt8", weight="QInt8"))

    assert [(v.node, v.what[:7]) for v in lint(graph, CONTRACT)] == [("one", "input 0"), ("two", "input 0")]


DYNAMIC = OrtCpu().contract("int8-dynamic", Options())
PRODUCT = "net (float[N,S,4] x) => (float y) <float[4,4] w> { [m] y = MatMul (x, w) }"


def test_another_tools_dynamic_model_can_keep_the_dynamic_contract(tmp_path):
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(float_model(PRODUCT, tmp_path).path), str(tmp_path / "dynamic.onnx"))

    assert lint(load_graph(tmp_path / "dynamic.onnx"), DYNAMIC) == ()


def test_unsigned_weights_break_the_dynamic_contract(tmp_path):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = tmp_path / "dynamic.onnx"
    quantize_dynamic(str(float_model(PRODUCT, tmp_path).path), str(path), weight_type=QuantType.QUInt8)

    (found,) = lint(load_graph(path), DYNAMIC)

    assert found.op_type == "MatMulInteger"
    assert found.what == (
        "input 1 ('w_quantized') is stored as uint8; ort-cpu takes int8 symmetric per-channel (axis 1)"
    )


def test_fixed_ranges_break_the_dynamic_contract(tmp_path):
    graph = by_another_tool(PRODUCT, tmp_path, **types(activation="QUInt8", weight="QInt8"))

    found = lint(graph, DYNAMIC)

    assert (
        "its range is fixed; ort-cpu takes MatMulInteger and DynamicQuantizeLSTM, on what DynamicQuantizeLinear "
        in (found[0].what)
    )
    assert found[0].reason


def test_weights_of_four_bits_break_the_contract_of_eight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # ONNX Runtime's quantizer writes a file where it is
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    text = PRODUCT.replace("4]", "64]").replace("[4,", "[64,")
    quantizer = MatMulNBitsQuantizer(onnx.load(float_model(text, tmp_path).path), block_size=32, is_symmetric=True)
    quantizer.process()
    onnx.save(quantizer.model.model, tmp_path / "nbits.onnx")

    (found,) = lint(load_graph(tmp_path / "nbits.onnx"), OrtCpu().contract("int8-weights", Options()))

    assert "is stored as int4 in blocks of 32 (axis 0); ort-cpu takes int8 symmetric blocks of 32" in found.what
