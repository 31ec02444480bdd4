import json
import uuid
from dataclasses import replace

import numpy as np
import pytest

from qdeploy.backends.coreml import package
from qdeploy.backends.coreml.backend import CoreML, Options
from qdeploy.backends.coreml.package import interface_of, operations, read_specification
from qdeploy.errors import InputError, InternalError
from qdeploy.model import DimRange, ImageInput
from qdeploy.samples.preprocessing import Preprocessing
from tests.backends.coreml.networks import BATCH, assert_equals_onnx_runtime, lowered, net, random_inputs, run
from tests.contracts.backend_contract import float_model, outputs_of

pytest.importorskip("coremltools")

DYNAMIC = net("m = MatMul (x, w)\ny = Add (m, b)", "float[4,5] w, float[5] b", "float[N,S,4] x")


def multi_array(artifact):
    return read_specification(artifact.path).description.input[0].type.multiArrayType


def test_a_dynamic_dimension_takes_every_size_in_its_range(tmp_path):
    model, artifact = lowered(DYNAMIC, tmp_path)

    ranges = multi_array(artifact).shapeRange.sizeRanges
    assert [(r.lowerBound, r.upperBound) for r in ranges] == [(1, 4), (1, 6), (4, 4)]
    assert list(multi_array(artifact).shape) == [2, 2, 4]
    for sizes in ({"N": 1, "S": 1}, {"N": 4, "S": 6}):
        assert_equals_onnx_runtime(model, artifact, random_inputs(model, **sizes))


def test_enumerated_shapes_are_the_smallest_the_typical_and_the_largest(tmp_path):
    _, artifact = lowered(DYNAMIC, tmp_path, options=Options(shapes="enumerated"))

    shapes = sorted(tuple(each.shape) for each in multi_array(artifact).enumeratedShapes.shapes)
    assert shapes == [(1, 1, 4), (2, 2, 4), (4, 6, 4)]


def test_enumerated_shapes_are_for_one_input(tmp_path):
    text = net("y = Add (x, z)", inputs="float[N,4] x, float[N,4] z")

    with pytest.raises(InputError, match="for one dynamic input; 'x', 'z' are"):
        lowered(text, tmp_path, options=Options(shapes="enumerated"))


def test_a_dynamic_dimension_without_range_is_refused_with_its_cure(tmp_path):
    with pytest.raises(InputError, match="'N', 'S' has none. Give --dim N=1:1:8 --dim S=1:1:8".replace(".", r"\.")):
        lowered(DYNAMIC, tmp_path, dims={})


def test_a_dimension_of_one_size_is_fixed(tmp_path):
    model, artifact = lowered(DYNAMIC, tmp_path, dims={**BATCH, "N": DimRange(3, 3, 3)})

    assert_equals_onnx_runtime(model, artifact, random_inputs(model, N=3))


def test_names_that_core_ml_does_not_take_are_kept_through_a_map(tmp_path):
    model = float_model(net("m = Relu (x)\ny = Neg (m)", inputs="float[2,3] x"), tmp_path)
    from qdeploy import graph as questions

    graph = questions.load_graph(model.path)
    graph.graph.inputs[0].name, graph.graph.outputs[0].name = "x.1/a", "1:out"
    questions.save_graph(graph, model.path)
    model = questions.describe(model.path, "m", {})
    (tmp_path / "a").mkdir()
    artifact = CoreML().lower(model, "fp32", tmp_path / "a", Options())

    found = interface_of(read_specification(artifact.path))
    assert {name: spec.name for name, spec in found.inputs.items()} == {"x_1_a": "x.1/a"}
    assert {name: spec.name for name, spec in found.outputs.items()} == {"v_1_out": "1:out"}
    x = np.array([[1, -2, 3], [4, 5, -6]], np.float32)
    np.testing.assert_array_equal(run(artifact, {"x.1/a": x})["1:out"], -np.maximum(x, 0))


def test_flags_and_wide_integers_keep_their_types(tmp_path):
    text = net(
        "c = And (a, b)\ny = Where (c, i, j)",
        inputs="bool[3] a, bool[3] b, int64[3] i, int64[3] j",
        outputs="int64 y, bool c",
    )
    _, artifact = lowered(text, tmp_path)
    a, b = np.array([True, True, False]), np.array([True, False, True])
    i, j = np.array([1, 2, 3]), np.array([-1, -2, -3])
    outputs = run(artifact, {"a": a, "b": b, "i": i, "j": j})

    assert outputs["y"].dtype == np.int64
    assert outputs["c"].dtype == np.bool_
    np.testing.assert_array_equal(outputs["y"], [1, -2, -3])
    np.testing.assert_array_equal(outputs["c"], a & b)


def test_the_manifest_has_identifiers_of_its_own_that_do_not_change(tmp_path):
    _, artifact = lowered(net("y = Relu (x)"), tmp_path)
    manifest = json.loads((artifact.path / "Manifest.json").read_text())

    assert manifest["rootModelIdentifier"] in manifest["itemInfoEntries"]
    assert all(uuid.UUID(name).version == 5 for name in manifest["itemInfoEntries"])
    assert not any("date" in key for key in read_specification(artifact.path).description.metadata.userDefined)


IMAGES = net("y = Conv (x, w, b)", "float[4,3,3,3] w, float[4] b", "float[1,3,8,8] x")


@pytest.mark.parametrize("color", ["rgb", "bgr"])
def test_an_image_input_has_the_preprocessing_baked_in(color, tmp_path):
    preprocessing = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), color=color)
    model = replace(float_model(IMAGES, tmp_path), image=preprocessing.image_input())
    (tmp_path / "a").mkdir()
    artifact = CoreML().lower(model, "fp32", tmp_path / "a", Options(image=True))
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    inputs = {"x": preprocessing.apply(Image.fromarray(pixels))}

    kind = read_specification(artifact.path).description.input[0].type.imageType
    assert kind.ColorSpace.Name(kind.colorSpace) == color.upper()
    assert (kind.height, kind.width) == (8, 8)
    expected = outputs_of(model.path, inputs)["y"]
    np.testing.assert_allclose(run(artifact, inputs)["y"], expected, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(InputError, match="takes pixels"):
        run(artifact, {"x": inputs["x"] + 0.01})


def test_an_image_input_scales_each_channel_by_itself():
    found = Preprocessing(scale=1 / 255, mean=(0.5,), std=(0.5, 0.25, 0.2)).image_input()

    assert found == ImageInput(
        (1 / 255 / 0.5, 1 / 255 / 0.25, 1 / 255 / 0.2), (-0.5 / 0.5, -0.5 / 0.25, -0.5 / 0.2), "rgb"
    )
    assert Preprocessing(layout="nhwc").image_input() is None


def test_a_classifier_tells_labels_and_keeps_the_models_output(tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("zero\none\ntwo\n")
    text = net("s = MatMul (x, w)\ny = Softmax (s)", "float[4,3] w", "float[1,4] x")
    model, artifact = lowered(text, tmp_path, options=Options(labels=str(labels)))
    outputs = [each.name for each in read_specification(artifact.path).description.output]

    assert "classLabel" in outputs
    assert any(operation.type == "classify" for operation in operations(read_specification(artifact.path)))
    assert_equals_onnx_runtime(model, artifact, random_inputs(model))


def test_a_wrong_request_that_coremltools_ignores_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "_expected_shapes", lambda *_: [(1, 9), (1, 9), (4, 4)])

    with pytest.raises(InternalError, match="not what was asked for: x takes the shapes"):
        lowered(DYNAMIC, tmp_path)


def test_int8_bytes_that_are_missing_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "_integer_bytes", lambda _: 7)

    with pytest.raises(InternalError, match="7 bytes of int8 constants instead of 108"):
        lowered(IMAGES, tmp_path, "int8")
