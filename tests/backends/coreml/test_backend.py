import subprocess
import sys

import numpy as np
import pytest

from qdeploy.backends.coreml.backend import CoreML, Options
from qdeploy.errors import InputError
from tests.contracts.backend_contract import NET, BackendContract, float_model, outputs_of, quantized_model, samples_for

pytest.importorskip("coremltools")


class TestCoreML(BackendContract):
    def backend(self):
        return CoreML()


class TestCoreMLInFloat16(BackendContract):
    float_tolerance = 1e-2

    def backend(self):
        return CoreML()

    def options(self):
        return Options(compute="float16")

    def test_int8_stays_near_its_own_qdq_graph(self, lower, inputs):
        lowered, artifact = lower("int8")
        with self.backend().open(artifact, self.options()) as runner:
            outputs = runner.run(inputs)

        for name, expected in outputs_of(lowered.path, inputs).items():
            assert np.abs(outputs[name] - expected).max() <= 0.05 * np.abs(expected).max()


def test_the_evidence_is_the_interpreters_where_core_ml_is_not(tmp_path):
    if sys.platform == "darwin":
        pytest.skip("Core ML itself runs here")
    model = float_model(NET, tmp_path)
    (tmp_path / "a").mkdir()
    artifact = CoreML().lower(model, "fp32", tmp_path / "a", Options())

    assert CoreML().open(artifact, Options()).evidence == "interpreted"


@pytest.mark.skipif(sys.platform != "darwin", reason="Core ML runs on macOS only: nothing was executed")
@pytest.mark.parametrize("units", ["all", "cpu-only", "cpu-and-gpu", "cpu-and-ne"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_core_ml_itself_gives_the_interpreters_outputs(units, precision, tmp_path):
    from qdeploy.backends.coreml.runner import Interpreted

    options = Options(units=units)
    model = float_model(NET, tmp_path)
    contract = CoreML().contract(precision, options)
    (tmp_path / "a").mkdir()
    lowered = quantized_model(model, contract, tmp_path) if precision == "int8" else model
    artifact = CoreML().lower(lowered, precision, tmp_path / "a", options)
    inputs = samples_for(model, number=1)[0].inputs
    with CoreML().open(artifact, options) as executed, Interpreted(artifact.path) as interpreted:
        found, expected = executed.run(inputs), interpreted.run(inputs)

    for name, array in expected.items():
        assert np.abs(found[name] - array).max() <= 0.02 * np.abs(array).max()


def test_nothing_that_coremltools_prints_reaches_the_terminal(tmp_path):
    code = f"""
from pathlib import Path
from tests.contracts.backend_contract import NET, float_model
from qdeploy.backends.coreml.backend import CoreML, Options
model = float_model(NET, Path({str(tmp_path)!r}))
Path({str(tmp_path)!r}, "a").mkdir()
CoreML().lower(model, "fp16", Path({str(tmp_path)!r}, "a"), Options())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == ""
    assert done.stderr == ""


def test_an_unknown_operator_is_refused_before_coremltools_is_loaded(tmp_path):
    text = """net (float[2,3] x) => (float[2,2,3] y) { [d] d = Det (e) [e] e = Hardmax (x) [n] y = NonZero (e) }"""
    code = f"""
import sys, time
from pathlib import Path
import onnx
from onnx import parser
from qdeploy.graph import describe
from qdeploy.backends.coreml.backend import CoreML, Options
from qdeploy.errors import InputError
model = parser.parse_model('''<ir_version: 10, opset_import: ["" : 20]>
net (float[2,3] x) => (float[2,3] y, int64[2,n] z) {{ [one] y = Hardmax (x) [two] z = NonZero (y) }}''')
folder = Path({str(tmp_path)!r})
onnx.save(model, folder / "m.onnx")
model = describe(folder / "m.onnx", "m", {{}})
begin = time.perf_counter()
try:
    CoreML().lower(model, "fp32", folder, Options())
except InputError as error:
    print(error)
print(time.perf_counter() - begin < 1, "coremltools" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert text
    assert "Core ML cannot take 2 operators of this model" in done.stdout
    assert "one (Hardmax): the operator Hardmax is not in the table" in done.stdout
    assert "two (NonZero): the operator NonZero is not in the table" in done.stdout
    assert done.stdout.splitlines()[-1] == "True False"


@pytest.mark.parametrize(
    ("labels", "message"),
    [("a\nb\nc\n", "has 3 class labels"), ("a\na\nb\nc\nd\n", "has 5 class labels"), (None, "cannot be read")],
)
def test_labels_that_do_not_fit_are_refused(labels, message, tmp_path):
    model = float_model("net (float[1,4] x) => (float y) <float[4,5] w> { y = MatMul (x, w) }", tmp_path)
    path = tmp_path / "labels.txt"
    if labels is not None:
        path.write_text(labels)

    with pytest.raises(InputError, match=message):
        CoreML().lower(model, "fp32", tmp_path / "nowhere", Options(labels=str(path)))


def test_an_image_needs_samples_that_are_images(tmp_path):
    model = float_model(NET, tmp_path)

    with pytest.raises(InputError, match="needs samples that are images"):
        CoreML().lower(model, "fp32", tmp_path / "nowhere", Options(image=True))


def test_the_preprocessing_of_a_folder_of_images_reaches_the_package(tmp_path):
    import torch
    from PIL import Image

    import qdeploy
    from qdeploy.backends.coreml.package import interface_of, read_specification

    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    for index, each in enumerate(pixels):
        Image.fromarray(each).save(folder / f"{index}.png")
    deployment = qdeploy.export(
        torch.nn.Conv2d(3, 2, 3).eval(),
        (torch.zeros(1, 3, 8, 8),),
        targets=["coreml:fp32"],
        evaluation=folder,
        preprocessing="mean=0.5 std=0.25",
        options={"coreml": {"image": True}},
        output=tmp_path / "bundle",
    )

    found = interface_of(read_specification(tmp_path / "bundle/coreml/model.mlpackage"))
    (row,) = deployment.report.targets
    assert deployment.ok
    assert found.image.scale == pytest.approx([1 / 255 / 0.25] * 3)
    assert found.image.bias == pytest.approx([-2.0] * 3)
    assert (row.evidence, row.latency_ms) == ("interpreted", None)
    assert row.sqnr_db > 80
