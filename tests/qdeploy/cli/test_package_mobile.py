"""package --for android and --for ios: what Linux can tell of projects that are built elsewhere."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import tree_sitter_kotlin
import tree_sitter_swift
from tree_sitter import Language, Parser

KOTLIN, SWIFT = (Parser(Language(each.language())) for each in (tree_sitter_kotlin, tree_sitter_swift))
PARSERS = {".kt": KOTLIN, ".kts": KOTLIN, ".swift": SWIFT}
DTYPES = {"FLOAT": "<f4", "float32": "<f4", "uint8": "u1"}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Bundles of a small network of photographs: one for ort-cpu and coreml, one for a Core ML classifier of pixels."""
    import onnx
    from onnx import helper, numpy_helper
    from PIL import Image

    from qdeploy import pipeline
    from qdeploy.model import ModelSource
    from qdeploy.recipe import Recipe, TargetRequest
    from qdeploy.samples.preprocessing import Preprocessing

    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(5)
    weights = {"k": random.normal(size=(4, 3, 3, 3)), "w": random.normal(size=(4, 3)), "c": random.normal(size=3)}
    nodes = [
        helper.make_node("Conv", ["image", "k"], ["conv"], name="conv"),
        helper.make_node("Relu", ["conv"], ["relu"], name="relu"),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"], name="pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "w", "c"], ["1:log$its"], name="classifier"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 3, 16, 20])],
        [helper.make_tensor_value_info("1:log$its", onnx.TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8), folder / "net.onnx")
    (folder / "labels.txt").write_text("cat\ndog\nbird\n")
    (folder / "images").mkdir()
    for i in range(6):
        pixels = random.integers(0, 256, (41, 57, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    classifier = {"image": "true", "labels": str(folder / "labels.txt"), "units": "cpu-and-ne"}
    preprocessing = Preprocessing(resize=21, crop=(16, 20), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), color="bgr")
    for name, targets in (
        ("photos", (TargetRequest("ort-cpu"), TargetRequest("coreml"))),
        ("01 pixels", (TargetRequest("coreml", "int8", classifier),)),
    ):
        recipe = Recipe(
            source=ModelSource.parse(str(folder / "net.onnx")),
            targets=targets,
            calibration=str(folder / "images"),
            preprocessing=preprocessing,
        )
        pipeline.run(recipe, folder / name)
    return folder


@pytest.fixture(scope="module")
def modules(bundle, tmp_path_factory):
    """Android modules of the problem's models, by the models' folders in the bundle."""
    from qdeploy.bundle.packages.android import package_android

    folder = tmp_path_factory.mktemp("modules")
    for name in ("ort-cpu", "ort-cpu-fp32"):
        package_android(bundle, folder / name, target=name)
    return folder


@pytest.fixture(scope="module")
def android(modules):
    """The module of the INT8 model."""
    return modules / "ort-cpu"


def broken(node):
    """What of a source file is no code."""
    if node.type == "ERROR" or node.is_missing:
        yield node.start_point.row + 1, node.text.decode()
    for child in node.children:
        yield from broken(child)


def sources(package):
    return [path for path in sorted(package.rglob("*")) if path.suffix in PARSERS]


def assert_sound(package):
    """Every source file parses, every placeholder is filled, and every checksum holds."""
    assert sources(package)
    for path in sources(package):
        text = path.read_text()
        assert list(broken(PARSERS[path.suffix].parse(text.encode()).root_node)) == [], path.name
        assert "{{" not in text, path.name
    assert "{{" not in (package / "README.md").read_text()
    check = subprocess.run(["sha256sum", "--quiet", "--strict", "-c", "SHA256SUMS"], cwd=package, check=False)
    assert check.returncode == 0


def stored(golden, entry):
    """A golden tensor's values as an app reads them: [samples, *shape]."""
    samples = json.loads((golden / "golden.json").read_text())["samples"]
    return np.fromfile(golden / entry["file"], DTYPES[entry["type"]]).reshape(samples, *entry["shape"])


def test_broken_code_is_found():
    assert list(broken(KOTLIN.parse(b"fun f( { }").root_node))
    assert list(broken(SWIFT.parse(b"func f( { }").root_node))


def run_ort(model, inputs):
    import onnxruntime as ort

    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return np.stack([session.run(None, {session.get_inputs()[0].name: x})[0] for x in inputs])


@pytest.mark.parametrize(("folder", "atol"), [("ort-cpu", 0.0), ("ort-cpu-fp32", 1e-5)])
def test_the_ort_model_computes_what_the_bundles_does(folder, atol, bundle, modules):
    model = modules / folder / "src/main/assets/model_bundle/model.ort"
    assert model.read_bytes()[4:8] == b"ORTM"
    golden = modules / folder / "src/androidTest/assets/golden"
    content = json.loads((golden / "golden.json").read_text())
    inputs, expected = (stored(golden, content[part][0]) for part in ("inputs", "outputs"))
    assert inputs.shape == (64, 1, 1, 8, 8)
    np.testing.assert_allclose(run_ort(model, inputs), expected, rtol=0, atol=atol)
    np.testing.assert_array_equal(run_ort(bundle / folder / "model.onnx", inputs), expected)


def operators(config):
    """The operators in a configuration, as ONNX Runtime's own tool reads them: a set of (domain, name)."""
    code = (
        "import json, sys; from onnxruntime.tools.reduced_build_config_parser import parse_config;"
        "required, types = parse_config(sys.argv[1], True);"
        "found = [[domain, op] for domain, sets in required.items() for ops in sets.values() for op in ops];"
        "json.dump(found, sys.stdout)"
    )
    run = subprocess.run([sys.executable, "-c", code, config], capture_output=True, text=True, check=True)
    return {tuple(each) for each in json.loads(run.stdout)}


@pytest.mark.parametrize("folder", ["ort-cpu", "ort-cpu-fp32"])
def test_the_configuration_names_the_operators_of_the_optimized_graph(folder, bundle, modules, tmp_path):
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    providers = ["CPUExecutionProvider"]
    ort.InferenceSession(
        str(bundle / folder / "model.onnx"), options, providers, disabled_optimizers=["NchwcTransformer"]
    )
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    config = modules / folder / "required_operators_and_types.config"
    assert operators(config) == {(node.domain or "ai.onnx", node.op_type) for node in nodes}
    assert "#" not in config.read_text()


def test_golden_outputs_may_be_off_as_far_as_quantization_moved_them(bundle, android):
    golden = android / "src/androidTest/assets/golden"
    outputs = np.load(bundle / "golden" / "outputs.npz")

    (output,) = json.loads((golden / "golden.json").read_text())["outputs"]

    ours, exact = (outputs[f"{folder}/logits"].astype(np.float64) for folder in ("ort-cpu", "float"))
    assert output["tolerance"] == np.abs(ours - exact).max()
    np.testing.assert_array_equal(stored(golden, output).reshape(ours.shape), ours)


def test_an_android_module_is_sound(android):
    assert_sound(android)
    kotlin = [path.name for path in sources(android)]
    assert kotlin == [
        "build.gradle.kts",
        "settings.gradle.kts",
        "Golden.kt",
        "GoldenTest.kt",
        "Model.kt",
    ]
    assert 'assets.open("model_bundle/model.ort")' in (android / "src/main/kotlin/Model.kt").read_text()


def test_the_library_is_of_the_version_that_wrote_the_model(android):
    import onnxruntime as ort

    needed = f'api("com.microsoft.onnxruntime:onnxruntime-android:{ort.__version__}")'
    assert needed in (android / "build.gradle.kts").read_text()


def test_equal_bundles_give_equal_modules_but_for_the_model(bundle, android, tmp_path, qdeploy):
    """ONNX Runtime writes the tables of an .ort file in no fixed order."""
    ended = qdeploy("package", bundle, "--for android -o", tmp_path / "again")

    assert (ended.code, ended.out) == (
        0,
        f"{tmp_path / 'again'}: test it on a device with gradle connectedAndroidTest\n",
    )
    first, second = ((folder / "SHA256SUMS").read_text().splitlines() for folder in (android, tmp_path / "again"))
    assert {line.split()[1] for line in {*first} ^ {*second}} <= {"src/main/assets/model_bundle/model.ort"}


def test_an_android_module_carries_the_preprocessing(photographs, tmp_path, qdeploy):
    package = tmp_path / "android"
    assert qdeploy("package", photographs / "photos", "--for android --quiet -o", package).code == 0

    assert_sound(package)
    lines = (package / "src/main/kotlin/Preprocessing.kt").read_text()
    for setting in (
        "val RESIZE: Int? = 21 //",
        "val CROP: Pair<Int, Int>? = 16 to 20 //",
        'const val COLOR = "bgr" //',
        "const val SCALE = 0.003921569f //",
        "val MEAN = floatArrayOf(0.4f, 0.5f, 0.6f) //",
        "val STD = floatArrayOf(0.2f, 0.25f, 0.3f)\n",
    ):
        assert setting in lines
    assert 'run(mapOf("image" to it))' in (package / "src/main/kotlin/Images.kt").read_text()
    assert 'outputs.get("1:log\\$its")' in (package / "README.md").read_text()
    golden = package / "src/androidTest/assets/golden"
    assert (golden / "image-4").read_bytes() == (photographs / "images" / "4.png").read_bytes()
    assert json.loads((golden / "golden.json").read_text())["images"] == {"step": pytest.approx(1 / 255 / 0.2)}
    assert (package / "src/androidTest/kotlin/ImagesTest.kt").exists()


def dictionary(name, code):
    """A dictionary of texts in Swift code."""
    (found,) = re.findall(rf"static let {name} = (\[.*\])", code)
    return json.loads(found.replace("[", "{").replace("]", "}"))


def test_the_mlpackage_of_a_swift_package_computes_what_the_bundles_does(photographs, tmp_path, qdeploy):
    from qdeploy.backends.coreml.interpreter import load_package

    package = tmp_path / "ios"
    ended = qdeploy("package", photographs / "photos", "--for ios -o", package)

    assert (ended.code, ended.out) == (0, f"{package}: test it on a Mac with swift test\n")
    assert_sound(package)
    content = json.loads((package / "Tests/golden/golden.json").read_text())
    inputs, expected = (stored(package / "Tests/golden", content[part][0]) for part in ("inputs", "outputs"))
    code = (package / "Sources/Model.swift").read_text()
    names = dictionary("inputs", code), dictionary("outputs", code)
    assert [list(each) for each in names] == [["image"], ["1:log$its"]]
    program = load_package(package / "Sources/model.mlpackage")
    found = [program.run({names[0]["image"]: x})[names[1]["1:log$its"]] for x in inputs]
    np.testing.assert_array_equal(np.stack(found), expected)
    np.testing.assert_array_equal(inputs[:, 0], np.load(photographs / "photos/golden/inputs.npz")["image"])
    assert "configuration.computeUnits = .all\n" in code
    assert (package / "Sources/Normalization.swift").exists()
    assert qdeploy("package", photographs / "photos", "--for ios -o", tmp_path / "again").code == 0
    assert (tmp_path / "again" / "SHA256SUMS").read_text() == (package / "SHA256SUMS").read_text()


def test_a_swift_package_that_takes_pixels_is_given_pixels(photographs, tmp_path, qdeploy):
    from PIL import Image

    from qdeploy.backends.coreml.interpreter import load_package

    package = tmp_path / "ios"
    assert qdeploy("package", photographs / "01 pixels", "--for ios --quiet -o", package).code == 0

    assert_sound(package)
    content = json.loads((package / "Tests/golden/golden.json").read_text())
    inputs, expected = (stored(package / "Tests/golden", content[part][0]) for part in ("inputs", "outputs"))
    image = Image.open(package / "Tests/golden/image-3").resize((29, 21), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(inputs[3], np.asarray(image.crop((4, 2, 24, 18))))
    program = load_package(package / "Sources/model.mlpackage")
    planes = inputs[..., ::-1].transpose(0, 3, 1, 2)[:, None].astype(np.float32)  # blue, green, red
    found = [program.run({"image": x})["classLabel_probs"] for x in planes]
    scores = [[each[label] for label in ("cat", "dog", "bird")] if isinstance(each, dict) else each for each in found]
    np.testing.assert_allclose(np.reshape(scores, expected.shape), expected, rtol=0, atol=1e-6)
    code = (package / "Sources/Model.swift").read_text()
    assert dictionary("outputs", code) == {"1:log$its": "classLabel_probs"}
    assert "configuration.computeUnits = .cpuAndNeuralEngine\n" in code
    assert 'name: "Model01Pixels"' in (package / "Package.swift").read_text()
    assert {path.name for path in (package / "Sources").glob("*.swift")} == {
        "Images.swift",
        "Model.swift",
        "PixelInput.swift",
        "Preprocessing.swift",
    }


def test_a_bundle_without_golden_samples_gives_packages_without_tests(photographs, tmp_path, qdeploy):
    import shutil

    from qdeploy.bundle.manifest import read_manifest, seal

    bare = tmp_path / "bare"
    shutil.copytree(photographs / "photos", bare)
    shutil.rmtree(bare / "golden")
    manifest = read_manifest(bare / "bundle.json")
    (bare / "bundle.json").unlink()
    seal(bare, manifest.model_copy(update={"files": {}}))

    for kind, missing in (("android", "src/androidTest"), ("ios", "Tests")):
        assert qdeploy("package", bare, "--for", kind, "--quiet -o", tmp_path / kind).code == 0
        assert_sound(tmp_path / kind)
        assert not (tmp_path / kind / missing).exists()
        assert "the bundle holds no golden samples" in (tmp_path / kind / "README.md").read_text()
    assert ".testTarget" not in (tmp_path / "ios" / "Package.swift").read_text()


def test_a_target_of_the_other_phone_is_refused(bundle, photographs, tmp_path, qdeploy):
    photos = photographs / "photos"

    swift = qdeploy("package", bundle, "--for ios -o", tmp_path / "out")
    kotlin = qdeploy("package", photos, "--for android --target coreml -o", tmp_path / "out")
    both = qdeploy("package", photos, "--for ios --target coreml --target ort-cpu -o", tmp_path / "out")

    assert (swift.code, kotlin.code, both.code) == (2, 2, 2)
    assert swift.err == (
        f"error: An iOS package cannot run ort-cpu, ort-cpu-fp32 of the bundle {bundle}.\n"
        "It runs coreml: export for one of them, or choose it with --target.\n"
    )
    assert kotlin.err == (
        f"error: An Android package cannot run coreml of the bundle {photos}.\n"
        "It runs ort-cpu: export for one of them, or choose it with --target.\n"
    )
    assert both.err == "error: A package for ios holds one target.\nGive --target once.\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "library", "extra"), [("android", "onnxruntime", "cpu"), ("ios", "coremltools", "coreml")]
)
def test_what_makes_the_package_must_be_installed(kind, library, extra, bundle, tmp_path, qdeploy, monkeypatch):
    monkeypatch.setattr(f"qdeploy.bundle.packages.{kind}.find_spec", lambda _: None)

    ended = qdeploy("package", bundle, "--for", kind, "-o", tmp_path / "out")

    assert ended.code == 3
    assert ended.err == f"error: {library} is not installed.\nInstall it: pip install 'qdeploy[{extra}]'\n"
