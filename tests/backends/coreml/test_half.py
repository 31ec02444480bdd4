import numpy as np
import onnx_ir as ir
import pytest
from onnx import parser

from qdeploy.backends.coreml.half import safe_constants
from qdeploy.backends.coreml.package import operations, read_specification
from qdeploy.errors import InputError
from tests.backends.coreml.networks import lowered, net, random_inputs, run
from tests.contracts.backend_contract import outputs_of

pytest.importorskip("coremltools")


def masked(value, behind):
    return net(
        f"m = Constant <value_float={value}> ()\nz = Constant <value_float=0.0> ()\nk = Cast <to=9> (c)\n"
        f"b = Where (k, z, m)\ns = Add (x, b)\n{behind}",
        inputs="float[2,4] x, float[2,4] c",
    )


@pytest.mark.parametrize("value", ["-3.4e38", "-1e9", "-1e5"])
def test_a_mask_that_float16_cannot_hold_becomes_one_that_it_can(value, tmp_path):
    model, artifact = lowered(masked(value, "y = Softmax (s)"), tmp_path, "fp16")
    inputs = random_inputs(model)
    inputs["c"] = np.array([[1, 0, 1, 1], [0, 0, 0, 0]], np.float32)
    outputs = run(artifact, inputs)["y"]

    assert np.isfinite(outputs).all()
    np.testing.assert_allclose(outputs[0], outputs_of(model.path, inputs)["y"][0], atol=2e-3)


def test_another_large_constant_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"float16 ends at 65504.*\(Where\) reads '.*' with 1e\+09.*coreml:fp32"):
        lowered(masked("-1e9", "y = Relu (s)"), tmp_path, "fp16")


def test_the_limits_of_a_clip_become_float16s_own(tmp_path):
    text = net(
        "l = Constant <value_float=0.0> ()\nh = Constant <value_float=1e6> ()\ny = Clip (x, l, h)",
        inputs="float[2,3] x",
    )
    _, artifact = lowered(text, tmp_path, "fp16")
    x = np.array([[1, -1, 60000], [3, 4, 5]], np.float32)

    np.testing.assert_array_equal(run(artifact, {"x": x})["y"], np.maximum(x, 0))


def test_a_model_without_large_constants_is_left_as_it_is(tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[2] x) => (float[2] y) <float[2] w = {65504.0, -65504.0}> { y = Mul (x, w) }"""

    assert safe_constants(ir.from_proto(parser.parse_model(text))) == {}


def test_a_scale_that_float16_cannot_hold_keeps_its_operator_in_float32(tmp_path):
    """coremltools would put 6e-8 in its place in silence, and the weights would be 60 times too large."""
    from qdeploy import graph as questions
    from qdeploy.backends.coreml.backend import CoreML, Options
    from qdeploy.quantize.weight_qdq import quantize_weight_qdq
    from tests.contracts.backend_contract import float_model

    model = float_model(
        net("m = MatMul (x, w)\ny = MatMul (m, v)", "float[4,5] w, float[5,3] v", "float[2,4] x"), tmp_path
    )
    graph = questions.load_graph(model.path)
    name, weight = next((n, v) for n, v in graph.graph.initializers.items() if tuple(v.shape) == (4, 5))
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1e-7), name=name)
    questions.save_graph(graph, model.path)
    model = questions.describe(model.path, "m", {})
    (tmp_path / "q").mkdir()
    (tmp_path / "a").mkdir()
    options = Options(compute="float16")
    quantized = quantize_weight_qdq(model, CoreML().contract("int8-weights", options), tmp_path / "q")
    artifact = CoreML().lower(quantized, "int8-weights", tmp_path / "a", options)
    kinds = [
        o.outputs[0].type.tensorType.dataType
        for o in operations(read_specification(artifact.path))
        if o.type == "linear"
    ]

    assert len(kinds) == 2
    assert kinds[0] != kinds[1]  # float32, then float16
