"""inspect: what a file or a bundle holds, and the rules that it breaks."""

import json
import shutil

import numpy as np
import pytest

NO_BUNDLE = "is not a qdeploy bundle: it holds no file bundle.json.\nName the folder that qdeploy export wrote with -o."


@pytest.fixture
def signed(problem, tmp_path):
    """The problem's network, quantized by ONNX Runtime's own tool with signed activations."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Samples(CalibrationDataReader):
        def __init__(self):
            self.images = iter(np.load(problem / "samples.npz")["image"][:4])

        def get_next(self):
            image = next(self.images, None)
            return None if image is None else {"image": image[None]}

    path = tmp_path / "signed.onnx"
    quantize_static(
        problem / "net.onnx",
        path,
        Samples(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
    )
    return path


def test_a_float_model(problem, qdeploy):
    ended = qdeploy("inspect", problem / "net.onnx")

    assert (ended.code, ended.err) == (0, "")
    assert "opset: 20\n" in ended.out
    assert "inputs\n  image=float32[1,1,8,8]\noutputs\n  logits=float32[1,3]\n" in ended.out
    assert f"size bytes: {(problem / 'net.onnx').stat().st_size:,}\n" in ended.out
    assert "constants\n  float32: 55\n" in ended.out  # 4·9 + 4 + 4·3 + 3
    assert "operators\n  Conv: 1\n  Relu: 1\n" in ended.out
    assert "computed in\n  integers: 0\n  float: 5\n" in ended.out
    assert "schemes" not in ended.out


def test_a_quantized_model(bundle, qdeploy):
    ended = qdeploy("inspect", bundle / "ort-cpu" / "model.onnx", "--json")

    facts = json.loads(ended.out)
    assert facts["schema"] == 1
    assert facts["model"] == "model.onnx"
    assert facts["constants"]["int8"] >= 36 + 12  # the weights; their zero points are int8, too
    assert facts["constants"].keys() >= {"float32", "int8", "int32", "uint8"}
    assert facts["computed_in"]["integers"] >= 3
    assert facts["computed_in"]["float"] == 0
    assert facts["schemes"]["constant int8 symmetric per-channel (axis 0)"] == 1
    assert any(scheme.startswith("activation uint8 asymmetric per-tensor") for scheme in facts["schemes"])


def test_a_bundle(bundle, qdeploy):
    ended = qdeploy("inspect", bundle)

    assert ended.code == 0
    assert "targets\n  ort-cpu: ort-cpu:int8 in model.onnx\n  ort-cpu-fp32: ort-cpu:fp32 in model.onnx\n" in ended.out
    assert f"  float/model.onnx: {(bundle / 'float' / 'model.onnx').stat().st_size:,}\n" in ended.out
    facts = json.loads(qdeploy("inspect", bundle, "--json").out)
    assert facts["inputs"] == ["image=float32[1,1,8,8]"]
    assert set(facts["files"]) == {
        str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file() and path.name != "bundle.json"
    }


def test_what_keeps_the_rules(bundle, qdeploy):
    ended = qdeploy("inspect", bundle, "--target", "ort-cpu")

    assert (ended.code, ended.out) == (0, "model.onnx keeps the rules of ort-cpu:int8.\n")


def test_what_breaks_the_rules_is_named_with_reason_and_cure(signed, qdeploy):
    ended = qdeploy("inspect", signed, "--target", "ort-cpu:int8")

    assert ended.code == 1
    assert "conv (Conv): input 0 ('image_DequantizeLinear_Output') is stored as int8" in ended.out
    assert ended.out.count("  why: ") == ended.out.count("  cure: ") >= 1
    assert "signed.onnx breaks the rules of ort-cpu:int8" in ended.out.splitlines()[-1]


def test_broken_rules_as_json(signed, qdeploy):
    ended = qdeploy("inspect", signed, "--target", "ort-cpu", "--json")

    found = json.loads(ended.out)
    assert ended.code == 1
    assert (found["schema"], found["model"], found["target"]) == (1, "signed.onnx", "ort-cpu:int8")
    assert all(violation["what"] and violation["reason"] and violation["cure"] for violation in found["violations"])
    assert "conv" in {violation["node"] for violation in found["violations"]}


def test_no_control_sequence_of_a_file_reaches_the_terminal(problem, tmp_path, qdeploy):
    import onnx

    model = onnx.load(problem / "net.onnx")
    model.graph.input[0].name = model.graph.node[0].input[0] = "\x1b[31mimage"
    onnx.save(model, tmp_path / "net.onnx")

    ended = qdeploy("inspect", tmp_path / "net.onnx")

    assert "?[31mimage=float32" in ended.out
    assert "\x1b" not in ended.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("gone.onnx", "There is no model file gone.onnx.\nCheck the path."),
        ("FOLDER", f"FOLDER {NO_BUNDLE}"),
        ("NET --target ort-cpi", "Unknown target 'ort-cpi'.\nDid you mean 'ort-cpu'? Known: "),
        ("NET --target ort-cpu:int9", "ort-cpu does not take the precision 'int9'.\nIt takes: int8, "),
    ],
)
def test_mistakes(arguments, message, problem, tmp_path, qdeploy):
    def filled(text):
        return text.replace("FOLDER", str(tmp_path)).replace("NET", str(problem / "net.onnx"))

    ended = qdeploy("inspect", filled(arguments))

    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"error: {filled(message)}")
    assert len(ended.err.splitlines()) == 2


def test_a_target_that_a_bundle_does_not_hold(bundle, tmp_path, qdeploy, monkeypatch):
    from qdeploy import registry

    monkeypatch.setitem(registry.backends()._paths, "twin", "qdeploy.backends.ort_cpu:OrtCpu")

    ended = qdeploy("inspect", bundle, "--target", "twin")

    assert (ended.code, ended.err) == (
        2,
        f"error: The bundle {bundle} has no target 'twin'.\nKnown: ort-cpu:int8, ort-cpu:fp32.\n",
    )


def test_a_target_whose_plug_in_needs_a_package(problem, qdeploy, unbuildable):
    ended = qdeploy("inspect", problem / "net.onnx", "--target", unbuildable)

    what = "The target 'abacus' needs the package 'abacus_runtime', which is not installed."
    assert (ended.code, ended.err) == (3, f"error: {what}\nInstall it: pip install abacus_runtime\n")


def test_a_changed_bundle_is_refused(bundle, tmp_path, qdeploy):
    changed = shutil.copytree(bundle, tmp_path / "changed")
    (changed / "report.json").write_text("{}")

    for command in ("inspect", "parity", "report", "bench"):
        ended = qdeploy(command, changed)

        what = f"The bundle {changed} is not as it was made: report.json was changed."
        cure = "Copy or export it anew; files of your own belong elsewhere."
        assert (ended.code, ended.out, ended.err) == (2, "", f"error: {what}\n{cure}\n")
