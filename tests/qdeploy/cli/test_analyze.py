"""`qdeploy analyze`: what it prints, its JSON, and what it refuses."""

import json
import math

import pytest

from qdeploy import analyze
from qdeploy.analysis.sensitivity import sensitivity


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qdeploy"


@pytest.fixture
def given(problem):
    return problem / "net.onnx", "--calibration", problem / "samples.npz"


def test_weights(qdeploy, given):
    ended = qdeploy("analyze weights", *given)

    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("net for ort-cpu\n")
    assert "Stored as: int8 symmetric per-channel (axis 0): 1, int8 symmetric per-channel (axis 1): 1." in ended.out
    rows = {line.split()[0]: line.split() for line in ended.out.splitlines() if line.startswith(("k ", "w "))}
    assert rows["k"][1] == "4×1×3×3"
    assert rows["w"][-1] in ("per-channel", "per-tensor")


def test_weights_as_json(qdeploy, given):
    ended = qdeploy("analyze weights --json --granularity per-tensor --target ort-cpu:int8", *given)

    found = json.loads(ended.out)
    assert {key: found[key] for key in ("schema", "analysis", "model", "target")} == {
        "schema": 1,
        "analysis": "weights",
        "model": "net",
        "target": "ort-cpu:int8",
    }
    assert [(row["weight"], row["scheme"]) for row in found["weights"]] == [
        ("k", "int8 symmetric per-tensor"),
        ("w", "int8 symmetric per-tensor"),
    ]


def test_layers(qdeploy, given):
    ended = qdeploy("analyze layers", *given)

    assert (ended.code, ended.err) == (0, "")
    assert "No layer's accumulated SQNR is below 20 dB." in ended.out
    assert "over 64 samples" in ended.out
    assert {"k", "w"} <= {line.split()[0] for line in ended.out.splitlines() if line}


def test_layers_as_json_hold_no_number_that_json_has_not(qdeploy, given):
    ended = qdeploy("analyze layers --json --samples 8 --keep classifier", *given)

    found = json.loads(ended.out, parse_constant=pytest.fail)
    assert found["samples"] == 8
    assert [layer["node"] for layer in found["layers"]] == ["conv", "pool"]
    assert found["left_float"] == {"classifier": "Kept by 'classifier'."}
    assert found["first_apart"] is None
    assert found["causes"] == []


def test_layers_name_a_planted_fault(qdeploy, problem, tmp_path):
    import onnx
    from onnx import numpy_helper

    model = onnx.load(problem / "net.onnx")
    (kernel,) = (tensor for tensor in model.graph.initializer if tensor.name == "k")
    array = numpy_helper.to_array(kernel).copy()
    array[2] *= 100
    kernel.CopyFrom(numpy_helper.from_array(array, "k"))
    onnx.save(model, tmp_path / "net.onnx")
    ended = qdeploy(
        "analyze layers --granularity per-tensor", tmp_path / "net.onnx", "--calibration", problem / "samples.npz"
    )

    said = " ".join(ended.out.split())
    assert "k: weight channels. Channel 2 of 'k' reaches" in said
    assert "To mend it: --granularity per-channel, or --recover equalization" in said


def test_layers_take_the_statistics_of_an_earlier_calibration(qdeploy, given, tmp_path, monkeypatch):
    assert qdeploy("calibrate --quiet", *given, "-o", tmp_path / "s.npz").code == 0
    anew = qdeploy("analyze layers --json", *given)
    monkeypatch.setattr(analyze, "collected", pytest.fail)

    again = qdeploy("analyze layers --json", *given, "--statistics", tmp_path / "s.npz")

    assert (again.code, again.out) == (0, anew.out)


def test_sensitivity(qdeploy, given):
    ended = qdeploy("analyze sensitivity --samples 16", *given)

    assert (ended.code, ended.err) == (0, "")
    assert [ended.out.count(name) for name in ("int4", "int8", "float16")] == [3, 3, 3]
    assert "over 16 samples." in ended.out
    assert "top1 of the float model: 1.0000." in ended.out


def test_sensitivity_as_json(qdeploy, given):
    found = json.loads(qdeploy("analyze sensitivity --json --bits 6,8", *given).out)

    assert {"conv", "pool", "classifier"} == {layer["node"] for layer in found["layers"]}
    for layer in found["layers"]:
        assert list(layer["effects"]) == ["int6", "int8"]
        assert layer["effects"]["int6"]["sqnr_db"] < layer["effects"]["int8"]["sqnr_db"]
    assert (found["samples"], found["metric"], found["reference_metric"]) == (64, "top1", 1.0)


def test_a_sensitivity_measured_before_is_found_again(qdeploy, given, cache, monkeypatch):
    first = qdeploy("analyze sensitivity --json --bits 8", *given)
    assert len(list(cache.iterdir())) == 1
    runs = []

    def counted(*arguments, **options):
        runs.append(arguments)
        return sensitivity(*arguments, **options)

    monkeypatch.setattr(analyze, "sensitivity", counted)

    assert qdeploy("analyze sensitivity --json --bits 8", *given).out == first.out
    assert runs == []
    assert qdeploy("analyze sensitivity --json --bits 8 --reader minmax", *given).out != first.out
    assert len(runs) == 1


def test_a_metric_of_the_users_is_measured_each_time(qdeploy, given, cache, tmp_path):
    (tmp_path / "metric.py").write_text("def half(outputs, labels):\n    return 0.5\n")

    found = json.loads(
        qdeploy("analyze sensitivity --json --bits 8 --metric", f"{tmp_path}/metric.py:half", *given).out
    )

    assert found["reference_metric"] == 0.5
    assert not cache.exists()


def test_a_recipe_gives_what_the_command_line_does_not(qdeploy, problem, tmp_path):
    (tmp_path / "recipe.toml").write_text(
        f'[model]\nsource = "{problem}/net.onnx"\n[calibration]\ndata = "{problem}/samples.npz"\nsamples = 5\n'
    )
    ended = qdeploy("analyze layers --json --recipe", tmp_path / "recipe.toml")

    assert (ended.code, ended.err) == (0, "")
    assert json.loads(ended.out)["samples"] == 5


def test_quiet_shows_nothing(qdeploy, given):
    ended = qdeploy("analyze weights --quiet", *given)

    assert (ended.code, ended.out, ended.err) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("layers --target ort-cpu:int8-dynamic", "ort-cpu:int8-dynamic has no calibrated ranges to analyze.\nName a"),
        ("sensitivity --bits 8,many", "--bits cannot be '8,many'.\nWrite widths with commas between, as in 4,8,16."),
        ("sensitivity --bits 1,8", "The widths cannot be 1, 8.\nName some from 2 to 16."),
        ("layers --keep nothing", "Nothing in the model matches --keep 'nothing'."),
        ("layers --target nowhere", "Unknown target 'nowhere'."),
        ("everything", "Invalid value for 'weights|sensitivity|layers'"),
    ],
)
def test_what_is_wrong_is_said(qdeploy, given, arguments, message):
    ended = qdeploy("analyze", arguments, *given)

    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"error: {message}")


def test_samples_are_needed(qdeploy, problem):
    ended = qdeploy("analyze weights", problem / "net.onnx")

    assert ended.code == 2
    assert ended.err == "error: There is no calibration data.\nGive --calibration DATA: analysis runs samples.\n"


def test_a_target_that_this_machine_lacks(qdeploy, given, unbuildable):
    ended = qdeploy("analyze layers --target", unbuildable, *given)

    assert ended.code == 3
    assert ended.err.startswith("error: The target abacus cannot be analyzed here:")


def test_a_figure_that_is_not_finite_is_null():
    from qdeploy.cli.analyze import _finite

    plain = {"a": [math.inf, 1.5, (math.nan,)], "b": {"c": -math.inf, "d": None, "e": "inf"}}
    assert _finite(plain) == {"a": [None, 1.5, [None]], "b": {"c": None, "d": None, "e": "inf"}}


def test_only_sensitivity_takes_workers(qdeploy, problem):
    data = ("--calibration", problem / "samples.npz")

    ended = qdeploy("analyze layers", problem / "net.onnx", *data, "--workers 2")

    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "error: --workers and --ray are not for layers.\nLeave them out; sensitivity takes them.\n"
