"""What users write on the command line becomes values, or a message; models and their digests as files."""

import hashlib

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.errors import InputError
from qdeploy.model import DimRange, ModelSource, TensorSpec, copy_model, digest_of_files, model_files, size_of_files

names = st.from_regex(r"[A-Za-z_][\w.:/]{0,8}", fullmatch=True)
dims = st.integers(0, 4096) | st.from_regex(r"[a-z][a-z_]{0,6}", fullmatch=True)
dtypes = st.sampled_from(["float32", "float64", "int64", "int32", "uint8", "bool"])
IMAGE = TensorSpec("image", "float32", ("batch", 3, 8, 8))


def test_a_dimension_range_is_named():
    assert DimRange.parse("batch=1:4:16") == ("batch", DimRange(1, 4, 16))


@pytest.mark.parametrize("text", ["", "batch", "batch=1:2", "batch=1:2:3:4", "batch=a:b:c", "batch=-1:1:2", "=1:1:1"])
def test_what_is_no_dimension_range_is_refused(text):
    with pytest.raises(InputError) as refused:
        DimRange.parse(text)
    assert str(refused.value) == (
        f"--dim cannot be {text!r}. Write name=minimum:typical:maximum, for example batch=1:1:8."
    )


@pytest.mark.parametrize("limits", ["0:1:2", "2:1:3", "1:4:3", "3:3:2"])
def test_a_dimension_range_is_in_order(limits):
    with pytest.raises(InputError, match=rf"The dimension range {limits} is not in order\."):
        DimRange.parse(f"batch={limits}")


@given(names, dtypes, st.lists(dims, max_size=5))
def test_an_input_is_read_as_it_is_written(name, dtype, shape):
    spec = TensorSpec(name, dtype, tuple(shape))

    assert TensorSpec.parse(str(spec)) == spec


def test_spaces_between_dimensions_do_not_matter():
    assert TensorSpec.parse("image=float32[batch, 3, 8, 8]") == IMAGE


@pytest.mark.parametrize(
    "text",
    ["image", "image=float32", "image=float16[1]", "image=float32[1,,2]", "image=float32[-1]", "=float32[1]", ""],
)
def test_what_is_no_input_is_refused(text):
    with pytest.raises(InputError) as refused:
        TensorSpec.parse(text)
    assert refused.value.what == f"--input cannot be {text!r}."
    assert "for example image=float32[batch,3,224,224]" in refused.value.cure


def test_a_digit_that_is_no_decimal_is_part_of_a_name():
    assert TensorSpec.parse("x=float32[n²,²]").shape == ("n²", "²")


@pytest.mark.parametrize(
    ("dtype", "shape", "why"),
    [
        ("float32", (7, 3, 8, 8), ""),
        ("float64", (7, 3, 8, 8), "has dtype float64, the model takes float32"),
        ("float32", (3, 8, 8), f"has shape [3, 8, 8], the model takes 4 dimensions: {IMAGE}"),
        ("float32", (7, 3, 9, 8), f"has shape [7, 3, 9, 8], the model takes 8 at dimension 2: {IMAGE}"),
    ],
)
def test_an_array_fits_or_it_is_said_why_not(dtype, shape, why):
    assert IMAGE.mismatch(dtype, shape) == why


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("models/net.onnx", "onnx", "net"),
        ("net.v2.pt2", "exported-program", "net.v2"),
        ("folder/model.py:build", "callable", "model"),
        ("package.module:build", "callable", "package"),
    ],
)
def test_the_text_tells_the_kind_of_source(text, kind, name):
    source = ModelSource.parse(text)

    assert (source.kind, source.name, source.text) == (kind, name, text)


@pytest.mark.parametrize("text", ["model.py", "net.pt", "", "folder/"])
def test_a_text_that_names_no_source_is_refused(text):
    with pytest.raises(InputError) as refused:
        ModelSource.parse(text)
    assert refused.value.what == f"{text!r} is no model source."
    assert "file.py:callable, package.module:callable" in refused.value.cure


def test_a_range_of_no_inputs_dimension_is_refused():
    with pytest.raises(InputError) as refused:
        ModelSource.parse("m.py:build", (IMAGE,), {"bach": DimRange(1, 1, 8)})
    assert str(refused.value) == "No input has a dimension 'bach'. --input names: batch."


def test_an_input_is_given_once():
    with pytest.raises(InputError, match=r"The input 'image' is given twice\. Give each --input once\."):
        ModelSource.parse("m.py:build", (IMAGE, IMAGE))


@pytest.fixture
def external(tmp_path):
    """A model with its weights in two files beside it, one of them in a folder."""
    folder = tmp_path / "original"
    (folder / "weights").mkdir(parents=True)
    arrays = {"v": np.arange(6, dtype=np.float32).reshape(2, 3), "w": np.ones((3, 2), np.float32)}
    nodes = [onnx.helper.make_node("MatMul", ["x", "v"], ["h"]), onnx.helper.make_node("MatMul", ["h", "w"], ["y"])]
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    for tensor, location in zip(tensors, ("weights/v.bin", "w.bin"), strict=True):
        (folder / location).write_bytes(tensor.raw_data)
        onnx.external_data_helper.set_external_data(tensor, location)
        tensor.ClearField("raw_data")
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 2]) for n in "xy"]
    graph = onnx.helper.make_graph(nodes, "net", ends[:1], ends[1:], tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=8)
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    return folder / "net.onnx"


def test_a_models_files_are_its_own_and_its_external_data(external):
    files = model_files(external)

    assert [path.relative_to(external.parent).as_posix() for path in files] == ["net.onnx", "w.bin", "weights/v.bin"]
    assert size_of_files(files) == external.stat().st_size + 24 + 24
    assert digest_of_files(files) == hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def test_a_copied_model_runs(external, tmp_path, run_onnx):
    (tmp_path / "copy").mkdir()
    x = np.array([[1.0, 2.0]], np.float32)

    copied = copy_model(external, tmp_path / "copy")

    assert copied == tmp_path / "copy" / "net.onnx"
    assert (tmp_path / "copy" / "weights" / "v.bin").is_file()
    expected = x @ np.arange(6).reshape(2, 3) @ np.ones((3, 2))
    np.testing.assert_allclose(run_onnx(copied, {"x": x})["y"], expected)
