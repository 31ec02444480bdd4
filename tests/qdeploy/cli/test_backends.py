"""backends: the targets, and the rules of one."""

from qdeploy.affine import IntegerType
from qdeploy.backends.ort_cpu import INT8_RULES, OrtCpu
from qdeploy.scheme import Condition, OpRule, PerChannel, QuantContract, Scheme


def test_every_target_is_listed_with_what_it_takes(qdeploy):
    ended = qdeploy("backends")

    assert (ended.code, ended.err) == (0, "")
    assert "ort-cpu  available\n" in ended.out
    assert "  precisions  int8 (default)" in ended.out
    assert "  options     threads=0, graph_level=all\n" in ended.out


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
