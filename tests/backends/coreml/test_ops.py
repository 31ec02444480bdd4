"""Forms of operators that exporters write and ONNX's own tests lack: dynamic sizes, computed shapes, large ranks."""

import numpy as np
import pytest

from qdeploy.backends.coreml.table import TABLE
from qdeploy.errors import InputError
from qdeploy.model import DimRange
from tests.backends.coreml.networks import BATCH, assert_equals_onnx_runtime, lowered, net, random_inputs, run
from tests.contracts.backend_contract import outputs_of

pytest.importorskip("coremltools")

SIZES = {**BATCH, "H": DimRange(4, 8, 16), "W": DimRange(4, 8, 16)}
PICTURE = "float[N,3,H,W] x"

FORMS = {
    "Conv of dynamic pictures": net("y = Conv <pads=[1,0,1,2], strides=[2,1]> (x, w)", "float[4,3,3,3] w", PICTURE),
    "Conv 1-D, dilated": net("y = Conv <dilations=[2], group=2> (x, w)", "float[4,2,3] w", "float[2,4,9] x"),
    "Conv 3-D": net("y = Conv (x, w)", "float[4,3,2,2,2] w", "float[1,3,4,5,6] x"),
    "ConvTranspose": net(
        "y = ConvTranspose <strides=[2,2], pads=[1,1,1,1], output_padding=[1,1]> (x, w, b)",
        "float[3,4,3,3] w, float[4] b",
        PICTURE,
    ),
    "ConvTranspose past its full result": net(
        "y = ConvTranspose <strides=[3,3], output_padding=[2,1]> (x, w, b)", "float[3,4,3,3] w, float[4] b", PICTURE
    ),
    "ConvTranspose in groups": net("y = ConvTranspose <group=3, strides=[2,2]> (x, w)", "float[3,2,2,2] w", PICTURE),
    "Gemm with factors": net(
        "y = Gemm <alpha=0.5, beta=2.0, transA=1> (x, w, b)", "float[2,5] w, float[5] b", "float[2,4] x"
    ),
    "Gemm with a computed right side": net("y = Gemm <transB=1> (x, z)", "", "float[2,4] x, float[3,4] z"),
    "MatMul of vectors": net("a = MatMul (v, x)\ny = MatMul (a, v)", "", "float[4,4] x, float[4] v"),
    "MatMul of batches": net("y = MatMul (x, z)", "", "float[N,3,S,4] x, float[N,3,4,S] z"),
    "Shapes that are computed": net(
        "s = Shape (x)\nb = Constant <value_ints=[0]> ()\ne = Constant <value_ints=[2]> ()\nf = Slice (s, b, e)\n"
        "l = Constant <value_ints=[-1]> ()\nk = Concat <axis=0> (f, l)\ny = Reshape <allowzero=1> (x, k)",
        "",
        "float[N,S,2,3] x",
    ),
    "Reshape that copies two dynamic sizes": net(
        "k = Constant <value_ints=[0,0,3,2]> ()\ny = Reshape (x, k)", "", "float[N,S,6] x"
    ),
    "Expand to a computed shape": net("s = Shape (z)\ny = Expand (x, s)", "", "float[1,1,4] x, float[N,S,4] z"),
    "Slice from the end of a dynamic axis": net(
        "b = Constant <value_ints=[-2]> ()\ne = Constant <value_ints=[9223372036854775807]> ()\n"
        "a = Constant <value_ints=[1]> ()\ny = Slice (x, b, e, a)",
        "",
        "float[N,S,4] x",
    ),
    "Slice backwards": net(
        "b = Constant <value_ints=[-1]> ()\ne = Constant <value_ints=[-9223372036854775807]> ()\n"
        "a = Constant <value_ints=[1]> ()\nt = Constant <value_ints=[-1]> ()\ny = Slice (x, b, e, a, t)",
        "",
        "float[N,S,4] x",
    ),
    "Slice to a computed end": net(
        "s = Shape <start=1, end=2> (x)\nb = Constant <value_ints=[0]> ()\na = Constant <value_ints=[1]> ()\n"
        "y = Slice (w, b, s, a)",
        "float[1,6,4] w",
        "float[N,S,4] x",
    ),
    "Gather of a last token": net("i = Constant <value_int=-1> ()\ny = Gather <axis=1> (x, i)", "", "float[N,S,4] x"),
    "Where with flags of more dimensions": net(
        "z = Constant <value_float=0.0> ()\nc = Greater (x, z)\nm = Constant <value_float=-3.4e38> ()\n"
        "b = Where (c, z, m)\ny = Softmax (b)",
        "",
        "float[N,S,4] x",
    ),
    "Where with broadcast values": net(
        "z = Constant <value_float=0.0> ()\nc = Greater (x, z)\ny = Where (c, u, v)",
        "",
        "float[N,S,4] x, float[4] u, float[1,4] v",
    ),
    "Split, unequal": net(
        "p = Constant <value_ints=[1,3]> ()\na, b = Split <axis=2> (x, p)\ny = Sub (b, a)", "", "float[N,S,4] x"
    ),
    "TopK": net(
        "k = Constant <value_ints=[2]> ()\ny, i = TopK <largest=0> (x, k)", "", "float[N,S,4] x", "float y, int64 i"
    ),
    "Resize by 2, nearest, dynamic": net(
        "s = Constant <value_floats=[1.0,1.0,2.0,2.0]> ()\n"
        'y = Resize <mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"> (x, , s)',
        "",
        PICTURE,
    ),
    "Resize by 2, linear, dynamic": net(
        's = Constant <value_floats=[1.0,1.0,2.0,2.0]> ()\ny = Resize <mode="linear"> (x, , s)', "", PICTURE
    ),
    "Resize by 1.5": net(
        's = Constant <value_floats=[1.0,1.0,1.5,1.5]> ()\ny = Resize <mode="linear"> (x, , s)', "", "float[1,3,5,7] x"
    ),
    "Resize, cubic": net(
        's = Constant <value_floats=[1.0,1.0,2.0,1.3]> ()\ny = Resize <mode="cubic"> (x, , s)', "", "float[1,3,5,7] x"
    ),
    "LSTM, bidirectional, dynamic": net(
        'y, h, c = LSTM <hidden_size=3, direction="bidirectional"> (x, w, r, b)',
        "float[2,12,4] w, float[2,12,3] r, float[2,24] b",
        "float[S,N,4] x",
        "float y, float h, float c",
    ),
    "LSTM with states": net(
        "y, h, c = LSTM <hidden_size=3> (x, w, r, , , i, j)",
        "float[1,12,4] w, float[1,12,3] r",
        "float[S,N,4] x, float[1,N,3] i, float[1,N,3] j",
        "float y, float h, float c",
    ),
    "GRU as torch writes it": net(
        'y, h = GRU <hidden_size=3, linear_before_reset=1, direction="bidirectional"> (x, w, r, b)',
        "float[2,9,4] w, float[2,9,3] r, float[2,18] b",
        "float[5,N,4] x",
        "float y, float h",
    ),
    "GRU of any length, both directions": net(
        'y, h = GRU <hidden_size=3, linear_before_reset=1, direction="bidirectional"> (x, w, r, b, , i)',
        "float[2,9,4] w, float[2,9,3] r, float[2,18] b",
        "float[S,N,4] x, float[2,N,3] i",
        "float y, float h",
    ),
    "GRU of many steps, backwards": net(
        'y, h = GRU <hidden_size=3, direction="reverse"> (x, w, r, b)',
        "float[1,9,4] w, float[1,9,3] r, float[1,18] b",
        "float[513,N,4] x",
        "float y, float h",
    ),
    "two GRUs of any length": net(
        "a = GRU <hidden_size=3> (x, w, r)\ns = Squeeze (a, d)\ny = GRU <hidden_size=3> (s, v, r)",
        "float[1,9,4] w, float[1,9,3] r, float[1,9,3] v, int64[1] d = {1}",
        "float[S,N,4] x",
    ),
    "LayerNormalization over two axes": net(
        "y = LayerNormalization <axis=-2> (x, w, b)", "float[3,4] w, float[3,4] b", "float[N,3,4] x"
    ),
    "GroupNormalization": net("y = InstanceNormalization (x, w, b)", "float[3] w, float[3] b", PICTURE),
    "MaxPool that rounds up": net(
        "y = MaxPool <kernel_shape=[3,3], strides=[2,2], ceil_mode=1> (x)", "", "float[1,3,8,8] x"
    ),
    "AveragePool with its padding": net(
        "y = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1> (x)", "", PICTURE
    ),
    "Trilu of a dynamic size": net("y = Trilu <upper=0> (x)", "", "float[N,S,S] x"),
    "CumSum": net("a = Constant <value_int=1> ()\ny = CumSum (x, a)", "", "float[N,S,4] x"),
    "Pad by reflection": net(
        'p = Constant <value_ints=[0,0,1,1,0,0,1,2]> ()\ny = Pad <mode="reflect"> (x, p)', "", PICTURE
    ),
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_a_form_gives_what_onnx_runtime_gives(text, tmp_path):
    model, artifact = lowered(text, tmp_path, dims=SIZES)

    for sizes in ({"H": 8, "W": 8}, {"N": 3, "S": 5, "H": 6, "W": 11}):
        assert_equals_onnx_runtime(model, artifact, random_inputs(model, **sizes), relative=2e-5)


def test_integers_divide_towards_zero(tmp_path):
    text = net("y = Div (x, z)", "", "int64[4] x, int64[4] z", "int64 y")
    _, artifact = lowered(text, tmp_path)
    x, z = np.array([7, -7, 7, -7]), np.array([2, 2, -2, -2])

    np.testing.assert_array_equal(run(artifact, {"x": x, "z": z})["y"], [3, -3, -3, 3])


QUANTIZED = {
    "Conv": net("y = Conv <pads=[1,1,1,1]> (x, w, b)", "float[4,3,3,3] w, float[4] b"),
    "ConvTranspose": net("y = ConvTranspose <strides=[2,2]> (x, w, b)", "float[3,4,2,2] w, float[4] b"),
    "residual": net(
        "a = Conv (x, w)\nb = Relu (a)\nc = Conv (b, v)\nd = Add (c, b)\ny = Conv (d, v)",
        "float[4,3,3,3] w, float[4,4,1,1] v",
    ),
    "MatMul": net("m = MatMul (x, w)\ny = Add (m, b)", "float[4,5] w, float[5] b", "float[N,S,4] x"),
    "Gemm": net(
        "m = Gemm (x, w, b)\nr = Relu (m)\ny = Gemm <transB=1> (r, v)",
        "float[4,5] w, float[5] b, float[3,5] v",
        "float[N,4] x",
    ),
    "pools": net(
        "a = Conv (x, w)\nb = MaxPool <kernel_shape=[2,2]> (a)\nc = AveragePool <kernel_shape=[2,2]> (b)\n"
        "d = GlobalAveragePool (c)\ne = Flatten (d)\ny = Gemm (e, v)",
        "float[4,3,3,3] w, float[4,5] v",
    ),
    "LSTM": net(
        'y, h, c = LSTM <hidden_size=3, direction="bidirectional"> (x, w, r, b)',
        "float[2,12,4] w, float[2,12,3] r, float[2,24] b",
        "float[S,N,4] x",
    ),
    "GRU": net(
        "y, h = GRU <hidden_size=3> (x, w, r, b, , i)",
        "float[1,9,4] w, float[1,9,3] r, float[1,18] b, float[1,2,3] i",
        "float[5,2,4] x",
    ),
    "GRU of any length": net(
        "y, h = GRU <hidden_size=3, linear_before_reset=1> (x, w, r, b)",
        "float[1,9,4] w, float[1,9,3] r, float[1,18] b",
        "float[S,N,4] x",
    ),
    "Concat": net(
        "a = Conv (x, w)\nb = Conv (x, v)\nc = Concat <axis=1> (a, b)\ny = Conv (c, u)",
        "float[4,3,1,1] w, float[2,3,1,1] v, float[3,6,1,1] u",
    ),
}


@pytest.mark.parametrize("text", QUANTIZED.values(), ids=QUANTIZED)
def test_int8_gives_what_its_qdq_graph_gives(text, tmp_path):
    model, artifact = lowered(text, tmp_path, "int8")
    inputs = random_inputs(model.float_model)
    expected = outputs_of(model.path, inputs)["y"]
    layers = {layer.node: layer.precision for layer in artifact.layers}

    step = (expected.max() - expected.min()) / 255
    assert model.quantized_nodes
    assert {layers[name] for name in model.quantized_nodes} == {"int8"}
    assert np.abs(run(artifact, inputs)["y"] - expected).max() <= 1.01 * step


REFUSED = {
    "sequence_lens": net(
        "y = LSTM <hidden_size=3> (x, w, r, , l)", "float[1,12,4] w, float[1,12,3] r", "float[5,2,4] x, int32[2] l"
    ),
    "its input 1 ('w') must be constant": net("y = Conv (x, w)", "", "float[1,3,4,4] x, float[2,3,3,3] w"),
    "has 6 dimensions; Core ML takes at most 5": net("y = Relu (x)", "", "float[1,2,1,2,1,2] x"),
    "dilations": net("y = MaxPool <kernel_shape=[2,2], dilations=[2,2]> (x)"),
    "coordinate_transformation_mode=tf_crop_and_resize": net(
        "r = Constant <value_floats=[0.0,0.0,0.0,0.0,1.0,1.0,1.0,1.0]> ()\nz = Constant <value_ints=[2,3,4,4]> ()\n"
        'y = Resize <mode="linear", coordinate_transformation_mode="tf_crop_and_resize"> (x, r, , z)'
    ),
    "with dynamic sizes": net(
        's = Constant <value_floats=[1.0,1.0,1.5,1.5]> ()\ny = Resize <mode="linear"> (x, , s)', "", PICTURE
    ),
    "negative pads": net("p = Constant <value_ints=[0,-1,0,0]> ()\ny = Pad (x, p)", "", "float[2,3] x"),
    "is an input of the model": net("y = Reshape (x, s)", "", "float[2,3] x, int64[2] s", "float[a,b] y"),
}


@pytest.mark.parametrize(("message", "text"), REFUSED.items(), ids=REFUSED)
def test_a_form_that_is_not_taken_is_refused_by_name(message, text, tmp_path):
    import re

    with pytest.raises(InputError, match=re.escape(message)) as caught:
        lowered(text, tmp_path, dims=SIZES)

    assert "Core ML cannot take" in str(caught.value)


def test_an_attribute_that_is_not_honoured_is_refused_by_name():
    import onnx_ir as ir
    from onnx import parser

    from qdeploy.backends.coreml.support import unsupported

    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[2] x) => (float[2] y) { y = Relu <strength=2> (x) }'
    (found,) = unsupported(ir.from_proto(parser.parse_model(text)))

    assert found.op_type == "Relu"
    assert found.reason == "its attribute strength is not honoured"


@pytest.mark.parametrize("kind", ["int4", "uint4", "int16", "uint16"])
def test_integers_of_other_widths_are_refused(kind):
    import onnx_ir as ir
    from onnx import parser

    from qdeploy.backends.coreml.support import unsupported

    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[2] x) => (float[2] y) <float s = {{0.5}}, {kind} z = {{0}}>
    {{ [q] q = QuantizeLinear (x, s, z) [d] y = DequantizeLinear (q, s, z) }}"""
    model = ir.from_proto(parser.parse_model(text))
    model.graph.node(0).outputs[0].dtype = ir.DataType[kind.upper()]

    assert [each.node for each in unsupported(model)] == ["q", "d"]
    assert all(kind in each.reason for each in unsupported(model))


def test_every_handler_names_its_operator_once():
    assert len(TABLE) > 100
    assert all(name[0].isupper() for name in TABLE)
