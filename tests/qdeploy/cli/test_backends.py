"""backends: the targets, and the rules of one."""

import json
import tomllib

import pytest

from qdeploy.affine import IntegerType
from qdeploy.backends.ort_cpu import INT8_RULES, OrtCpu
from qdeploy.recommend import RECOMMENDATIONS, recommend_by_name
from qdeploy.scheme import Condition, OpRule, PerChannel, QuantContract, Scheme


def test_every_target_is_listed_with_what_it_takes(qdeploy):
    ended = qdeploy("backends")

    assert (ended.code, ended.err) == (0, "")
    assert "ort-cpu  available\n" in ended.out
    assert "  precisions  int8 (default)" in ended.out
    assert "  options     threads=0, graph_level=all" in ended.out
    assert "reduce_range=False" in ended.out


def test_a_target_whose_package_is_missing_is_listed_with_its_cure(qdeploy, unbuildable):
    ended = qdeploy("backends")

    assert ended.code == 0
    assert ended.out.startswith(
        "abacus  missing: The target 'abacus' needs the package 'abacus_runtime', which is not installed.\n"
        "  to get it   Install it: pip install abacus_runtime\n"
    )


def test_a_target_that_cannot_be_built_here_says_why(qdeploy, monkeypatch):
    from qdeploy.backend import Availability

    monkeypatch.setattr(OrtCpu, "availability", lambda _: Availability(ok=False, reason="no sky", cure="go outside"))

    ended = qdeploy("backends")

    assert "ort-cpu  missing: no sky\n  to get it   go outside\n" in ended.out


def test_the_rules_of_a_target_are_shown_whole(qdeploy):
    ended = qdeploy("backends", "--ops", "ort-cpu")

    assert ended.code == 0
    assert ended.out.startswith("ort-cpu:int8  opset 13 to 25, int32 biases\n")
    for rule in INT8_RULES:
        assert f"  why: {rule.reason}\n" in ended.out
    assert ended.out.count("  why: ") == len(INT8_RULES)
    assert ended.out.count("  cure: ") == sum(bool(rule.cure) for rule in INT8_RULES)
    assert "\nConvTranspose\n  float\n" in ended.out


def test_a_rule_is_shown_with_its_conditions_and_schemes(qdeploy, monkeypatch):
    activation = Scheme(IntegerType(8, signed=False), symmetric=False)
    weight = Scheme(IntegerType(4), symmetric=True, granularity=PerChannel(0))
    rules = (
        OpRule(
            "Conv", (Condition.CONSTANT_WEIGHT, Condition.GRAPH_OUTPUT), {1: weight, 0: activation}, reason="Quick."
        ),
        OpRule("Reshape", moves_values=True, reason="Moves."),
        OpRule("Erf", reason="Odd.", cure="Use Gelu."),
    )
    contract = QuantContract("ort-cpu", "fp32", (7, 9), "float", "inputs", rules)
    monkeypatch.setattr(OrtCpu, "contract", lambda *_: contract)

    ended = qdeploy("backends", "--ops", "ort-cpu:fp32")

    assert (
        ended.out
        == """\
ort-cpu:fp32  opset 7 to 9, float biases
QDQ pairs stand before quantized operators. The first rule that matches an operator wins;
an operator that none matches stays float.

Conv with a constant weight, it writes a graph output that nothing else reads
  input 0: uint8 asymmetric per-tensor; input 1: int4 symmetric per-channel (axis 0); output: float
  why: Quick.

Reshape
  integers with the scale of input 0, where that is integers already
  why: Moves.

Erf
  float
  why: Odd.
  cure: Use Gelu.
"""
    )


def test_an_unknown_target(qdeploy):
    ended = qdeploy("backends", "--ops", "xyz")

    assert ended.code == 2
    assert ended.err.startswith("error: Unknown target 'xyz'.\nKnown: ")


def test_a_device_gets_a_recommendation_with_its_reasons(qdeploy):
    ended = qdeploy("backends", "--device", "x86-no-vnni")

    assert (ended.code, ended.err) == (0, "")
    row = recommend_by_name("x86-no-vnni")
    assert ended.out.startswith(f"x86-no-vnni  {row.covers}\n  target      ort-cpu:int8\n")
    for reason in row.reasons:
        assert f"  why         {reason.text}\n              ({reason.evidence})\n" in ended.out
    assert ended.out.endswith(
        "  command     qdeploy export SOURCE --target ort-cpu:int8 --set ort-cpu.reduce_range=true --reader mse "
        "--calibration DATA\n"
    )


def test_a_recommendation_as_json(qdeploy):
    ended = qdeploy("backends", "--device", "nvidia-sm75", "--json")

    found = json.loads(ended.out)
    assert [*found] == ["schema", "device", "covers", "target", "precision", "reader", "options", "reasons"]
    assert (found["target"], found["reader"], found["options"]) == ("tensorrt", None, {"arch": "sm75"})
    assert {*found["reasons"][0]} == {"text", "evidence"}


def test_json_without_a_device_is_refused(qdeploy):
    ended = qdeploy("backends", "--json")

    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "error: --json is for what --device recommends.\nAdd --device NAME, or leave out --json.\n"


def test_help_names_every_device(qdeploy):
    out = " ".join(qdeploy("backends", "--help").out.replace("│", " ").split())

    for row in RECOMMENDATIONS:
        assert row.device in out


def test_target_auto_is_what_is_recommended_for_this_machine(qdeploy, problem, tmp_path):
    wanted = recommend_by_name("auto")
    if wanted.target != "ort-cpu":
        pytest.skip("NOT TESTED: this machine is recommended another target than the CPU")

    ended = qdeploy(
        *(
            "export",
            problem / "net.onnx",
            "--target auto --calibration",
            problem / "samples.npz",
            "-o",
            tmp_path / "out",
        )
    )

    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [(row["target"], row["precision"]) for row in report["targets"]] == [(wanted.target, wanted.precision)]
    note = next(note for note in report["notes"] if note.startswith(f"--target auto chose {wanted.target}:"))
    assert note.split(".")[0] in " ".join(ended.out.split())
    recipe = tomllib.loads((tmp_path / "out/recipe.toml").read_text())
    assert recipe["target"] == [{"name": wanted.target, "precision": wanted.precision, **wanted.options}]


def test_inspect_takes_auto_too(qdeploy, bundle):
    model = bundle / "ort-cpu/model.onnx"

    assert qdeploy("inspect", model, "--target auto").out == qdeploy("inspect", model, "--target ort-cpu").out
