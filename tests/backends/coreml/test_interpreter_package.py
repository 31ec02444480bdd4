"""What a package states, and what is said of one that is damaged or cannot be run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qdeploy.backends.coreml.interpreter import load_package
from qdeploy.errors import InputError, InternalError, UnavailableError
from tests.backends.coreml.mil import load, save, tools

torch = pytest.importorskip("torch")
pytest.importorskip("coremltools")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

X = np.arange(12, dtype=np.float32).reshape(3, 4)
WEIGHT = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
FILES = Path("Data/com.apple.CoreML")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return save(lambda mb, x: mb.linear(x=x, weight=WEIGHT), {"x": X}, folder / "net.mlpackage")


@pytest.fixture
def package(whole, tmp_path):
    """A copy, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "net.mlpackage"))


def rewrite(package: Path, change) -> Path:
    """The package with a change of its protobuf."""
    tools()
    from coremltools.proto.Model_pb2 import Model

    path = package / FILES / "model.mlmodel"
    model = Model.FromString(path.read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())
    return package


def operations(model):
    function = model.mlProgram.functions["main"]
    return {each.type: each for each in function.block_specializations[function.opset].operations}


def test_a_package_runs(package):
    np.testing.assert_allclose(load_package(package).run({"x": X})["out0"], X @ WEIGHT.T, rtol=1e-5)


def test_the_package_is_imported_without_coremltools_or_torch():
    code = "import sys, qdeploy.backends.coreml.interpreter as i; print({'torch', 'coremltools'} & set(sys.modules))"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_package_is_read_without_warnings_on_standard_error(package):
    load = "from pathlib import Path; from qdeploy.backends.coreml.interpreter import load_package"
    code = f"{load}; load_package(Path({str(package)!r}))"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr == ""


def refuse(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_package(path)
    return str(caught.value)


def test_a_folder_that_is_no_package(tmp_path):
    assert "is not an .mlpackage: it has no Manifest.json." in refuse(tmp_path)


def test_a_manifest_that_is_no_json(package):
    (package / "Manifest.json").write_text("{")

    assert "does not name a model" in refuse(package)


def test_a_manifest_that_names_nothing(package):
    (package / "Manifest.json").write_text(json.dumps({"itemInfoEntries": {}}))

    assert "does not name a model: KeyError('rootModelIdentifier')" in refuse(package)


def test_a_missing_model_file(package):
    (package / FILES / "model.mlmodel").unlink()

    assert "net.mlpackage lacks its model file model.mlmodel." in refuse(package)


def test_a_damaged_model_file(package):
    path = package / FILES / "model.mlmodel"
    path.write_bytes(path.read_bytes()[:-20])

    assert "net.mlpackage/model.mlmodel is damaged" in refuse(package)


def test_a_missing_weights_file(package):
    (package / FILES / "weights/weight.bin").unlink()

    assert "net.mlpackage lacks its weights file weight.bin." in refuse(package)


@pytest.mark.parametrize("left", [70, 160])
def test_a_weights_file_that_is_cut_short(package, left):
    path = package / FILES / "weights/weight.bin"
    path.write_bytes(path.read_bytes()[:left])

    assert "net.mlpackage/weight.bin is cut short: it ends before byte" in refuse(package)


def test_a_weights_file_that_holds_something_else(package):
    path = package / FILES / "weights/weight.bin"
    path.write_bytes(bytes(len(path.read_bytes())))

    assert "net.mlpackage/weight.bin holds no fp32 constant at byte 64." in refuse(package)


def test_weights_of_another_size_than_declared(package):
    def change(model):
        weight = next(
            each
            for each in model.mlProgram.functions["main"].block_specializations["CoreML7"].operations
            if each.attributes["val"].WhichOneof("value") == "blobFileValue"
        )
        weight.attributes["val"].type.tensorType.dimensions[0].constant.size = 6

    assert "A constant of type fp32[6, 4] has 80 bytes." in refuse(rewrite(package, change))


def test_weights_outside_the_package(package):
    def change(model):
        for each in model.mlProgram.functions["main"].block_specializations["CoreML7"].operations:
            if each.attributes["val"].WhichOneof("value") == "blobFileValue":
                each.attributes["val"].blobFileValue.fileName = "@model_path/../../../elsewhere.bin"

    assert "net.mlpackage keeps weights outside itself" in refuse(rewrite(package, change))


def test_a_model_that_is_no_program(package):
    def change(model):
        model.identity.SetInParent()

    assert "holds a model of type identity, not an mlProgram." in refuse(rewrite(package, change))


def test_a_model_without_a_main_function(package):
    def change(model):
        model.mlProgram.functions["other"].CopyFrom(model.mlProgram.functions["main"])
        del model.mlProgram.functions["main"]

    assert "has no function main; it has: other." in refuse(rewrite(package, change))


def test_an_unknown_operator_is_named_and_nothing_is_run(package):
    def change(model):
        operations(model)["linear"].type = "fold_space"

    program = load_package(rewrite(package, change))

    assert program.unknown_operators == ("fold_space",)
    assert "fold_space" in [each.type for each in program.operations]
    with pytest.raises(UnavailableError, match=r"cannot run net\.mlpackage: it does not know fold_space"):
        program.run({"x": X})


def test_an_unknown_argument_is_named_and_nothing_is_run(package):
    def change(model):
        linear = operations(model)["linear"]
        linear.inputs["twist"].CopyFrom(linear.inputs["weight"])

    program = load_package(rewrite(package, change))

    assert program.unknown_operators == ("linear(twist)",)
    with pytest.raises(UnavailableError, match=r"it does not know linear\(twist\)"):
        program.run({"x": X})


def test_an_lstm_with_a_peephole_is_refused(tmp_path):
    arrays = {
        "x": np.zeros((2, 1, 3), np.float32),
        "h": np.zeros((1, 2), np.float32),
        "c": np.zeros((1, 2), np.float32),
    }

    def build(mb, x, h, c):
        weights = {"weight_ih": np.ones((8, 3), np.float32), "weight_hh": np.ones((8, 2), np.float32)}
        return mb.lstm(x=x, initial_h=h, initial_c=c, **weights, peephole=np.ones(6, np.float32))

    assert load(build, arrays, tmp_path).unknown_operators == ("lstm(peephole)",)


def test_an_unknown_operator_inside_a_block_is_found(tmp_path):
    def build(mb, x):
        return mb.cond(
            pred=mb.greater(x=mb.reduce_sum(x=x), y=0.0),
            _true_fn=lambda: mb.random_normal(shape=np.int32([3, 4])),
            _false_fn=lambda: mb.identity(x=x),
        )

    assert load(build, {"x": X}, tmp_path).unknown_operators == ("random_normal",)


def test_an_unknown_way_of_an_operator_is_refused(tmp_path):
    def build(mb, x):
        return mb.resize(
            x=x,
            shape=np.int32([6, 8]),
            resized_dims=np.uint32(2),
            interpolation_mode="NEAREST_NEIGHBOR",
            sampling_mode="ALIGN_CORNERS",
        )

    with pytest.raises(UnavailableError, match="no resize to the nearest neighbor with sampling_mode='ALIGN_CORNERS'"):
        load(build, {"x": X}, tmp_path).run({"x": X})


def test_an_upsampling_whose_elements_are_not_documented_is_refused(tmp_path):
    x = np.zeros((1, 3, 5), np.float32)

    def build(mb, x):
        return mb.upsample_nearest_neighbor(x=x, scale_factor_height=1.5, scale_factor_width=1.5)

    with pytest.raises(UnavailableError, match=r"no upsample_nearest_neighbor of \[3, 5\] elements by 1.5 and 1.5"):
        load(build, {"x": x}, tmp_path).run({"x": x})


def test_a_quotient_of_integers_is_refused(tmp_path):
    x = np.int32([7, -7])

    with pytest.raises(UnavailableError, match="no real_div of integers"):
        load(lambda mb, x: mb.real_div(x=x, y=np.int32(2)), {"x": x}, tmp_path).run({"x": x})


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_out_of_range_is_refused(index, tmp_path):
    arrays = {"x": X, "i": np.int32([0, index])}

    with pytest.raises(InputError, match=f"gather is given the index {index} where there are 3 elements"):
        load(lambda mb, x, i: mb.gather(x=x, indices=i), arrays, tmp_path).run(arrays)


def test_a_result_that_is_not_as_declared_is_a_bug(package):
    def change(model):
        operations(model)["linear"].outputs[0].type.tensorType.dimensions[1].constant.size = 9

    with pytest.raises(InternalError, match=r"linear .* gives torch.float32\[3, 5\], but is declared as"):
        load_package(rewrite(package, change)).run({"x": X})


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({}, "net.mlpackage needs an input 'x'. It takes x=float32[3,4]."),
        ({"x": X, "y": X}, "net.mlpackage has no input 'y'. It takes x=float32[3,4]."),
        ({"x": X[:2]}, "The input 'x' is float32[2, 4]. net.mlpackage takes x=float32[3,4]."),
        ({"x": X.astype(np.float64)}, "The input 'x' is float64[3, 4]. net.mlpackage takes x=float32[3,4]."),
    ],
)
def test_inputs_that_do_not_fit_are_refused(whole, inputs, text):
    with pytest.raises(InputError) as caught:
        load_package(whole).run(inputs)

    assert str(caught.value) == text


def test_outputs_are_the_callers_own(whole):
    program = load_package(whole)
    first = program.run({"x": X})["out0"]
    first += 1

    assert not np.array_equal(first, program.run({"x": X})["out0"])


def convert(shape, inputs, path: Path, *, classes=()):
    """A model of relu(mean over the last axis) with the inputs and classes that are asked for."""
    ct = tools()
    from coremltools.converters.mil import Builder as mb  # noqa: N813 - as in coremltools' documentation

    @mb.program(input_specs=[mb.TensorSpec(shape)], opset_version=ct.target.iOS17)
    def program(x):
        return mb.reduce_mean(x=mb.relu(x=x), axes=[-1], name="y")

    model = ct.convert(
        program,
        inputs=inputs,
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT32,
        classifier_config=ct.ClassifierConfig(list(classes)) if classes else None,
        skip_model_load=True,
    )
    model.save(str(path))
    return load_package(path)


def test_flexible_shapes(tmp_path):
    ct = tools()
    from coremltools.converters.mil.mil import get_new_symbol

    shape = ct.Shape((ct.RangeDim(1, 8, 2), 3, 4))
    program = convert((get_new_symbol(), 3, 4), [ct.TensorType("x", shape=shape)], tmp_path / "net.mlpackage")

    feature = program.inputs["x"]
    assert str(feature) == "x=float32[1..8,3,4]"
    assert feature.shape == (2, 3, 4)
    x = np.random.default_rng(0).standard_normal((7, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(program.run({"x": x})["y"], np.maximum(x, 0).mean(-1), rtol=1e-6)
    with pytest.raises(InputError, match=r"'x' is float32\[9, 3, 4\]"):
        program.run({"x": np.zeros((9, 3, 4), np.float32)})


def test_shapes_out_of_a_list(tmp_path):
    ct = tools()
    from coremltools.converters.mil.mil import get_new_symbol

    shapes = ct.EnumeratedShapes([(2, 4), (3, 4)], default=(3, 4))
    program = convert((get_new_symbol(), 4), [ct.TensorType("x", shape=shapes)], tmp_path / "net.mlpackage")

    assert str(program.inputs["x"]) == "x=float32[3,4] or x=float32[2,4]"
    assert program.run({"x": X[:2]})["y"].shape == (2,)
    assert not program.inputs["x"].accepts((1, 4))


def test_image_inputs(tmp_path):
    ct = tools()
    image = ct.ImageType("x", shape=(1, 3, 4, 6), scale=1 / 255, bias=[-0.5, 0, 0.5], color_layout=ct.colorlayout.BGR)
    program = convert((1, 3, 4, 6), [image], tmp_path / "net.mlpackage")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 4, 6)).astype(np.uint8)

    assert (program.inputs["x"].image, program.inputs["x"].shape) == ("BGR", (1, 3, 4, 6))
    wanted = np.maximum(pixels / 255 + np.reshape([-0.5, 0, 0.5], (3, 1, 1)), 0).mean(-1)
    np.testing.assert_allclose(program.run({"x": pixels})["y"], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [("cat", "dog", "owl"), (10, 20, 30)])
def test_a_classifier(classes, tmp_path):
    ct = tools()
    inputs = [ct.TensorType("x", shape=(1, 3, 4))]
    program = convert((1, 3, 4), inputs, tmp_path / "net.mlpackage", classes=classes)

    outputs = program.run({"x": np.float32([[[0, 0, 0, 1], [4, 4, 4, 4], [1, 1, 1, 1]]])})

    assert outputs["classLabel"].item() == classes[1]
    np.testing.assert_allclose(outputs["classLabel_probs"], [0.25, 4, 1])
