"""ONNX files and exported programs that are damaged or contradict themselves: one clear refusal, nothing written."""

import copy
import io
import os
import pickle
import random
import zipfile

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

FLIPS = int(os.environ.get("QDEPLOY_FUZZ", "24"))
"""How many files with changed or missing bytes are tried; more in a longer run."""

QUANTIZE = "quantize bad.onnx --target ort-cpu --calibration samples.npz --quiet"
INSPECT = "inspect bad.onnx --target ort-cpu"


def node(model, name):
    return next(each for each in model.graph.node if each.name == name)


def constant(model, name):
    return next(each for each in model.graph.initializer if each.name == name)


def put(name, array):
    return lambda model: constant(model, name).CopyFrom(numpy_helper.from_array(np.asarray(array), name))


def claim(name, *dims):
    """Other dimensions than the data have."""

    def change(model):
        constant(model, name).dims[:] = dims

    return change


def stored_as(kind):
    return lambda model: setattr(constant(model, "w"), "data_type", kind)


def external(location, **where):
    """The weight lies in another file."""

    def change(model):
        tensor = constant(model, "w")
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, **where}.items():
            tensor.external_data.add(key=key, value=str(value))

    return change


def reads(name, *inputs):
    def change(model):
        node(model, name).input[:] = inputs

    return change


def operator(name, op_type, domain="", **attributes):
    def change(model):
        changed = node(model, name)
        changed.op_type, changed.domain = op_type, domain
        changed.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())

    return change


def without_node(name):
    return lambda model: model.graph.node.remove(node(model, name))


def without_constant(name):
    return lambda model: model.graph.initializer.remove(constant(model, name))


def opset(version):
    return lambda model: setattr(model.opset_import[0], "version", version)


def image(*dims):
    """Another shape of the input."""
    value = helper.make_tensor_value_info("image", TensorProto.FLOAT, dims)
    return lambda model: model.graph.input[0].CopyFrom(value)


def image_of(kind):
    return lambda model: model.graph.input[0].CopyFrom(helper.make_value_info("image", kind))


def image_elements(kind):
    return lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", kind)


def recursive(model):
    inner = helper.make_node("F", ["x"], ["y"], domain="local")
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    model.functions.append(helper.make_function("local", "F", ["x"], ["y"], [inner], imports))
    model.opset_import.append(helper.make_opsetid("local", 1))
    operator("relu", "F", "local")(model)


def huge_output(model):
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**34]), "size"))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["size"], ["big"], name="big"))
    model.graph.output.append(helper.make_tensor_value_info("big", TensorProto.FLOAT, [2**34]))


def sparse(model):
    values, places = (
        numpy_helper.from_array(np.ones(2, np.float32), "s"),
        numpy_helper.from_array(np.array([0, 5]), "i"),
    )
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [36, 3]))
    reads("classifier", "flat", "s")(model)


def dequantized_by_a_computed_scale(model):
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["w", "image"], ["dequantized"], name="dq"))
    reads("classifier", "flat", "dequantized")(model)


def twice(field):
    def change(model):
        repeated = getattr(model.graph, field)
        repeated.append(copy.deepcopy(repeated[0]))

    return change


def emptied(field):
    return lambda model: model.graph.ClearField(field)


FLOAT = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])

FAULTS = {
    "a node is missing": without_node("conv"),
    "the last node is missing": without_node("softmax"),
    "a weight is missing": without_constant("w"),
    "a shape is missing": without_constant("shape"),
    "an input is renamed": reads("relu", "gone"),
    "an output is renamed": lambda model: setattr(model.graph.output[0], "name", "gone"),
    "two nodes write one tensor": lambda model: node(model, "relu").output.__setitem__(0, "conv"),
    "the graph has a cycle": reads("conv", "logits", "k"),
    "a node reads itself": reads("relu", "relu"),
    "the operator is unknown": operator("relu", "Rleu"),
    "the domain is unknown": operator("relu", "Relu", "com.example"),
    "the operator has no inputs": reads("conv"),
    "the operator has too few inputs": reads("conv", "norm"),
    "the operator has too many inputs": reads("relu", "norm", "k", "w"),
    "the weight is no input": reads("classifier", "flat", ""),
    "an LSTM has one input": operator("classifier", "LSTM"),
    "a limit is a vector": lambda model: (operator("relu", "Clip")(model), reads("relu", "norm", "w", "c")(model)),
    "an attribute is a text": operator("classifier", "Gemm", alpha="much"),
    "an attribute is unknown": operator("relu", "Relu", alpha=1.0),
    "groups are none": operator("conv", "Conv", group=0),
    "groups do not divide": operator("conv", "Conv", group=7),
    "padding is huge": operator("pool", "MaxPool", pads=[2**40] * 4),
    "no opset": lambda model: model.ClearField("opset_import"),
    "opset 0": opset(0),
    "opset -3": opset(-3),
    "opset 6": opset(6),
    "opset 99": opset(99),
    "opset 2^62": opset(2**62),
    "a newer format": lambda model: setattr(model, "ir_version", 99),
    "no format": lambda model: setattr(model, "ir_version", 0),
    "a weight of no channels": put("w", np.zeros((0, 3), np.float32)),
    "a kernel of no channels": put("k", np.zeros((0, 1, 3, 3), np.float32)),
    "a bias of no values": put("c", np.zeros(0, np.float32)),
    "a weight of integers": put("w", np.zeros((36, 3), np.int32)),
    "a weight of other floats": put("w", np.zeros((36, 3))),
    "a weight of texts": put("w", np.array(["a", "b"], object)),
    "a weight turned round": put("w", np.zeros((3, 36), np.float32)),
    "a kernel of two dimensions": put("k", np.zeros((4, 9), np.float32)),
    "a kernel of none": put("k", np.float32(1)),
    "a shape that does not fit": put("shape", np.array([-1, 35])),
    "a shape of two unknowns": put("shape", np.array([-1, -1])),
    "a huge shape": put("shape", np.array([2**40, 2**40])),
    "more values claimed": claim("w", 36, 300),
    "fewer values claimed": claim("w", 36, 2),
    "negative dimensions": claim("w", -36, -3),
    "a dimension of zero": claim("w", 0, 3),
    "huge dimensions": claim("w", 2**40, 2**40),
    "a huge dimension": claim("w", 2**33),
    "an undefined type": stored_as(TensorProto.UNDEFINED),
    "an unknown type": stored_as(77),
    "packed integers": stored_as(TensorProto.INT4),
    "complex numbers": stored_as(TensorProto.COMPLEX64),
    "no data": lambda model: constant(model, "w").ClearField("raw_data"),
    "data twice": lambda model: constant(model, "w").float_data.extend([1.0] * 108),
    "a constant twice": twice("initializer"),
    "an input twice": twice("input"),
    "no inputs": emptied("input"),
    "no outputs": emptied("output"),
    "no nodes": emptied("node"),
    "no graph": lambda model: model.ClearField("graph"),
    "an input of no dimensions": image(),
    "an input of no values": image("batch", 1, 0, 8),
    "an input of fewer than none": image("batch", 1, -1, 8),
    "a huge input": image("batch", 1, 2**40, 8),
    "an input without a shape": lambda model: model.graph.input[0].type.tensor_type.ClearField("shape"),
    "an input without a type": lambda model: model.graph.input[0].ClearField("type"),
    "an input without a name": lambda model: setattr(model.graph.input[0], "name", ""),
    "an input of texts": image_elements(TensorProto.STRING),
    "an input of eight-bit floats": image_elements(TensorProto.FLOAT8E4M3FN),
    "an input of an unknown type": image_elements(99),
    "a sequence": image_of(helper.make_sequence_type_proto(FLOAT)),
    "an optional input": image_of(helper.make_optional_type_proto(FLOAT)),
    "a map": image_of(helper.make_map_type_proto(TensorProto.INT64, FLOAT)),
    "a sparse input": image_of(helper.make_sparse_tensor_type_proto(TensorProto.FLOAT, [1, 1, 8, 8])),
    "a sparse weight": sparse,
    "a recursive function": recursive,
    "a branch without branches": lambda model: model.graph.node.insert(0, helper.make_node("If", ["k"], ["x"])),
    "a computed scale": dequantized_by_a_computed_scale,
    "an output that fits no memory": huge_output,
    "external data that are missing": external("gone.bin"),
    "external data without a place": lambda model: setattr(constant(model, "w"), "data_location", TensorProto.EXTERNAL),
    "external data that are short": external("data.bin", offset=8, length=432),
    "external data of another length": external("data.bin", offset=0, length=5),
    "external data beyond the end": external("data.bin", offset=10**6, length=432),
    "external data before the start": external("data.bin", offset=-8, length=432),
    "external data at a text": external("data.bin", offset="x", length="y"),
    "external data at an absolute place": external("/etc/passwd", offset=0, length=432),
    "external data outside the folder": external("../secret.bin", offset=0, length=432),
    "external data in a device": external("/dev/zero", offset=0, length=432),
    "external data behind a link": external("link.bin", offset=0, length=432),
    "external data in a pipe": external("pipe", offset=0, length=432),
    "external data in a folder": external("."),
    "external data in no file": external(""),
}
FOUND_BY_RUNNING = {
    *("the domain is unknown", "an LSTM has one input", "a limit is a vector"),
    *("groups are none", "groups do not divide", "padding is huge", "a kernel of two dimensions"),
    *("opset 0", "opset -3", "opset 6", "opset 99", "opset 2^62", "fewer values claimed", "data twice", "no data"),
    *("an input of no values", "an input of fewer than none", "a huge input", "an output that fits no memory"),
    *("external data of another length",),
}
"""Faults that a look at the graph alone may miss."""


@pytest.fixture
def folder(here):
    """The working folder, with files to be found or not beside the model."""
    (here.parent / "secret.bin").write_bytes(bytes(432))
    (here / "data.bin").write_bytes(bytes(432))
    (here / "link.bin").symlink_to("data.bin")
    os.mkfifo(here / "pipe")
    return here


def names(folder):
    return {path.name for path in folder.iterdir()}


def check_refused(ended):
    assert (ended.code, ended.out) == (2, ""), ended.err
    assert ended.err.startswith("error: ")
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("fault", FAULTS)
def test_a_graph_that_contradicts_itself_is_refused(folder, net, qdeploy, fault):
    model = copy.deepcopy(net)
    FAULTS[fault](model)
    (folder / "bad.onnx").write_bytes(model.SerializeToString())
    before = names(folder)

    check_refused(qdeploy(QUANTIZE))

    inspected = qdeploy(INSPECT)
    if fault in FOUND_BY_RUNNING and inspected.code != 2:
        assert inspected.code in (0, 1)
        assert inspected.err == ""
    else:
        check_refused(inspected)
    assert names(folder) == before


def test_the_model_is_in_order_before_it_is_spoilt(folder, net, qdeploy):
    (folder / "bad.onnx").write_bytes(net.SerializeToString())

    assert qdeploy(QUANTIZE).code == 0


def damaged(content, dice):
    """A file cut short, or with some of its bytes changed."""
    if dice.random() < 0.25:
        return content[: dice.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(dice.choice([1, 1, 2, 8])):
        changed[dice.randrange(len(changed))] = dice.choice([0, 255, dice.randrange(256)])
    return bytes(changed)


@pytest.mark.parametrize("seed", range(FLIPS))
def test_a_damaged_file_is_quantized_or_refused(here, net, qdeploy, seed):
    (here / "bad.onnx").write_bytes(damaged(net.SerializeToString(), random.Random(seed)))

    ended = qdeploy(QUANTIZE)

    assert ended.code in (0, 1, 2), ended.err
    assert "Traceback" not in ended.err
    assert names(here) - {"out"} == {"bad.onnx", "samples.npz"}
    if ended.code == 2:
        check_refused(ended)
        assert not (here / "out").exists()


def test_a_name_that_is_no_text_is_refused(here, net, qdeploy):
    (here / "bad.onnx").write_bytes(net.SerializeToString().replace(b"softmax", b"so\xfftmax"))

    ended = qdeploy(QUANTIZE)

    assert ended.err == (
        "error: bad.onnx is not an ONNX model, or is damaged (the text b'so\\xfftmax' is no UTF-8).\nExport it anew.\n"
    )


def test_a_name_cannot_control_the_terminal(here, net, qdeploy):
    (here / "bad.onnx").write_bytes(net.SerializeToString().replace(b"image", b"\x1b[31m"))

    ended = qdeploy(QUANTIZE)

    assert ended.code == 2
    assert ended.err == "error: The array 'image' in samples.npz is no input of the model.\nKnown: ?[31m, labels.\n"


@pytest.mark.parametrize("command", [f"{QUANTIZE} --statistics bad.onnx", "inspect bad.onnx", "bench bad.onnx"])
def test_other_files_are_no_models(here, qdeploy, command):
    for content in (b"", b"text", b"PK\x03\x04", bytes(1000)):
        (here / "bad.onnx").write_bytes(content)

        check_refused(qdeploy(command))


@pytest.mark.parametrize("dims", [("batch", 1, -1, 8), ("batch", 1, 2**40, 8)])
def test_an_input_that_no_array_can_be_is_not_timed(here, net, qdeploy, dims):
    model = copy.deepcopy(net)
    image(*dims)(model)
    (here / "bad.onnx").write_bytes(model.SerializeToString())

    ended = qdeploy("bench bad.onnx")

    check_refused(ended)
    assert f"No array can be made for the input image=float32[batch,1,{dims[2]},8]: " in ended.err


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The bytes of an exported program: x [2, 4] → [2, 3]."""
    import torch

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(4, 3), (torch.zeros(2, 4),)), path)
    return path.read_bytes()


EXPORT = "export bad.pt2 --target ort-cpu:fp32 --quiet"


def test_the_program_is_in_order_before_it_is_spoilt(here, program, qdeploy):
    (here / "bad.pt2").write_bytes(program)

    assert qdeploy(EXPORT).code == 0


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x05\x06" + bytes(18)], ids=["empty", "text", "empty archive"])
def test_other_files_are_no_programs(here, qdeploy, content):
    (here / "bad.pt2").write_bytes(content)

    ended = qdeploy(EXPORT)

    check_refused(ended)
    assert ended.err.startswith("error: bad.pt2 is not a torch.export program: ")
    assert ended.err.endswith("Write one with torch.export.save.\n")
    assert names(here) == {"bad.pt2", "samples.npz"}


@pytest.mark.parametrize("seed", range(FLIPS // 3))
def test_a_damaged_program_is_exported_or_refused(here, program, qdeploy, seed):
    (here / "bad.pt2").write_bytes(damaged(program, random.Random(seed)))

    ended = qdeploy(EXPORT)

    assert ended.code in (0, 2), ended.err
    assert (here / "out").exists() == (ended.code == 0)
    if ended.code == 2:
        check_refused(ended)


class Trap:
    """Unpickled, it leaves a file."""

    def __reduce__(self):
        return open, ("trap", "w")


def torch_bytes(value):
    import torch

    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def with_pickled_weight(name, content):
    if name.endswith("weights_config.json"):
        return content.replace(b'"use_pickle": false', b'"use_pickle": true')
    return torch_bytes(Trap()) if "/weights/" in name else content


def with_pickled_examples(name, content):
    return torch_bytes(((Trap(),), {})) if "/sample_inputs/" in name else content


def with_pickled_constant(name, content):
    if name.endswith("constants_config.json"):
        meta = '{"path_name": "opaque_obj_0", "is_param": false, "use_pickle": true, "tensor_meta": null}'
        return f'{{"config": {{"c": {meta}}}}}'.encode()
    return content


@pytest.mark.parametrize("change", [with_pickled_weight, with_pickled_examples, with_pickled_constant])
def test_nothing_in_a_program_is_unpickled(here, program, qdeploy, change):
    with zipfile.ZipFile(io.BytesIO(program)) as whole, zipfile.ZipFile(here / "bad.pt2", "w") as bad:
        for name in whole.namelist():
            bad.writestr(name, change(name, whole.read(name)))
        if change is with_pickled_constant:
            bad.writestr("net/data/constants/opaque_obj_0", pickle.dumps(Trap()))

    ended = qdeploy(EXPORT)

    assert not (here / "trap").exists()
    check_refused(ended)
    assert ended.err.startswith("error: bad.pt2 is not a torch.export program: ")
