"""A whole run: rows that are simulated, what the bundle holds, and targets that TensorRT cannot build."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import qdeploy
from qdeploy import bundled
from qdeploy.cli import main
from qdeploy.device import cuda_devices
from tests.contracts.backend_contract import NET, float_model

pytestmark = [
    pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX: pip install tensorrt-rtx"),
    pytest.mark.skipif(cuda_devices() > 0, reason="has a GPU: rows are executed"),
]


def images(count=4):
    random = np.random.default_rng(0)
    return [{"image": random.standard_normal((2, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployment")
    model = float_model(NET, folder)
    targets = ["tensorrt:int8", "tensorrt:fp16", "tensorrt:int8-fp16"]
    options = {"tensorrt": {"arch": ["sm86", "sm89"]}}
    return qdeploy.export(
        str(model.path), targets=targets, calibration=images(), output=folder / "out", options=options
    )


def test_rows_are_simulated_and_have_no_latency(deployment):
    for row in deployment.report.targets:
        assert (row.status, row.evidence, row.latency_ms, row.speedup) == ("pass", "simulated", None, None), row.reason
        assert "ran on ONNX Runtime's CPU; its latency was not measured." in row.reason
        assert row.options["arch"] == ["sm86", "sm89"]
    assert deployment.report.reference.latency_ms is None


def test_the_row_tells_which_precision_pays(deployment):
    (int8, *_) = deployment.report.targets

    assert any("fp16 is the first to try for speed. Not measured: any latency" in text for text in int8.warnings)


def test_the_folder_holds_plan_model_and_layers(deployment):
    folder = deployment.path / "tensorrt"

    names = sorted(path.name for path in folder.iterdir())
    layers = json.loads((folder / "layers.json").read_text())["layers"]
    assert names == ["layers.json", "model.onnx", "model.plan", "plan.json"]
    assert {each["node"] for each in layers if each["precision"] == "int8"} == {"conv", "pointwise", "classifier"}
    assert json.loads((folder / "plan.json").read_text())["architectures"] == ["sm86", "sm89"]


def test_a_bundle_is_run_again_from_its_files(deployment):
    outputs = deployment.run(images(1)[0], "tensorrt-int8-fp16")

    assert {name: array.dtype.name for name, array in outputs.items()} == {"features": "float32", "logits": "float32"}


def test_a_simulation_is_never_timed(deployment):
    assert list(bundled.bench(deployment.path)) == ["float"]


def test_its_model_keeps_the_rules_it_was_made_by(deployment, capfd):
    code = main(["inspect", str(deployment.path / "tensorrt" / "model.onnx"), "--target", "tensorrt:int8"])

    assert (code, capfd.readouterr().out) == (0, "model.onnx keeps the rules of tensorrt:int8.\n")


def test_rules_are_shown_with_advice(capsys):
    main(["backends", "--ops", "tensorrt:int8-fp16"])
    text = capsys.readouterr().out

    assert "QDQ pairs stand before quantized operators; everything else is float16." in text
    assert "Not measured: any latency, and TensorRT itself" in text


def test_what_the_parser_lacks_is_a_row_and_other_targets_are_built(tmp_path):
    text = "net (float[2,3,3] x) => (float[2] y) { [odd] y = Det (x) }"
    model = float_model(text, tmp_path)
    samples = [{"x": np.random.default_rng(0).standard_normal((2, 3, 3)).astype(np.float32)}]

    report = qdeploy.export(
        str(model.path), targets=["tensorrt:fp32", "ort-cpu:fp32"], evaluation=samples, output=tmp_path / "out"
    ).report

    assert [row.status for row in report.targets] == ["unavailable", "pass"]
    assert "odd (Det)" in report.targets[0].reason
    assert report.exit_code == 3


def test_a_missing_range_is_found_before_calibration(tmp_path, capsys):
    text = "net (float[batch,3,8,8] x) => (float y) <float[4,3,1,1] w> { y = Conv (x, w) }"
    model = float_model(text, tmp_path)
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 1, 3, 8, 8), np.float32))
    arguments = ["export", str(model.path), "--target", "tensorrt", "--calibration", str(tmp_path / "x.npz")]

    code = main([*arguments, "-o", str(tmp_path / "out")])

    assert code == 2
    assert "Add --dim batch=minimum:typical:maximum" in capsys.readouterr().err
    assert not Path(tmp_path / "out").exists()


def test_an_unknown_architecture_is_refused_at_once(tmp_path, capsys):
    code = main(["export", "no.onnx", "--target", "tensorrt", "--set", "tensorrt.arch=sm90", "-o", str(tmp_path / "o")])

    assert code == 2
    assert "TensorRT-RTX has no engines for H100 and H200" in capsys.readouterr().err
