"""One layer at a time in fewer bits: numpy, scipy and the float model say what the output loses."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from qdeploy.affine import IntegerType
from qdeploy.analysis import sensitivity as room
from qdeploy.analysis.operands import at_bits, takes_bits
from qdeploy.analysis.sensitivity import kl_divergence, parts, sensitivity
from qdeploy.errors import InputError
from qdeploy.parity.metrics import metric_from_name
from qdeploy.scheme import OpRule, PerTensor, QuantContract, Scheme


def logits(x, constants):
    return np.maximum(x @ constants["w"] + constants["b"], 0) @ constants["v"] + constants["c"]


@pytest.fixture
def plans(planned, contract):
    """Plans of a model at widths, as the analysis names them."""

    def make(model, samples, *widths):
        return {f"int{width}": planned(model, samples, rules=at_bits(contract, width)) for width in widths}

    return make


@pytest.mark.parametrize("width", [4, 8])
def test_a_layer_alone_in_integers(two_gemms, plans, folder, random_samples, rounded, decibels, width):
    model, constants = two_gemms
    samples = [replace(sample, labels=np.array([i % 4])) for i, sample in enumerate(random_samples(model, 20))]
    made = plans(model, samples, width)
    found = sensitivity(made, samples, folder(), metric=metric_from_name("top1"))
    (plan,) = made.values()

    affine, limit = plan.activations["x"], 2 ** (width - 1) - 1
    weight = rounded(constants["w"], plan.weights["w"].scale, 0, -limit, limit)
    x = np.concatenate([sample.inputs["x"] for sample in samples])
    stored = rounded(x, float(affine.scale), int(affine.zero_point), 0, 2**width - 1)
    exact, approximate = logits(x, constants), logits(stored, constants | {"w": weight})
    labels = np.concatenate([sample.labels for sample in samples])
    (effect,) = (layer.effects[f"int{width}"] for layer in found.layers if layer.node == "first")
    assert effect.sqnr_db == pytest.approx(decibels(exact, approximate), abs=0.02)
    assert effect.kl_divergence == pytest.approx(
        entropy(softmax(exact, 1), softmax(approximate, 1), axis=1).mean(), rel=0.01
    )
    assert effect.agreement == np.mean(exact.argmax(1) == approximate.argmax(1))
    assert effect.metric == np.mean(approximate.argmax(1) == labels)
    assert found.reference_metric == np.mean(exact.argmax(1) == labels)
    assert (found.metric, found.samples) == ("top1", 20)


def test_a_layer_alone_in_float16(two_gemms, planned, folder, random_samples, decibels):
    model, constants = two_gemms
    samples = random_samples(model, 20)
    found = sensitivity({"float16": planned(model, samples)}, samples, folder())

    def half(array):
        return array.astype(np.float16).astype(np.float32)

    x = np.concatenate([sample.inputs["x"] for sample in samples])
    expected = decibels(logits(x, constants), logits(half(x), constants | {"w": half(constants["w"])}))
    (effect,) = (layer.effects["float16"] for layer in found.layers if layer.node == "first")
    assert effect.sqnr_db == pytest.approx(expected, abs=0.1)
    assert effect.metric is None


def test_the_most_sensitive_layer_comes_first_and_more_bits_cost_less(five_convolutions, plans, folder, random_samples):
    model = five_convolutions()
    samples = random_samples(model, 4)
    found = sensitivity(plans(model, samples, 4, 8, 16), samples, folder())

    by_width = [[layer.effects[name].sqnr_db for layer in found.layers] for name in ("int4", "int8", "int16")]
    assert by_width[1] == sorted(by_width[1])
    assert (np.diff(by_width, axis=0) > 15).all()
    assert {layer.node for layer in found.layers} == {*(f"conv{i}" for i in range(5)), "pool", "classifier"}


def test_a_layer_that_stays_float_in_one_type_comes_last_there(two_gemms, planned, folder, random_samples):
    model, _ = two_gemms
    samples = random_samples(model)
    plans = {"int8": planned(model, samples, keep=("first",)), "float16": planned(model, samples)}
    found = sensitivity(plans, samples, folder())

    assert [(layer.node, list(layer.effects)) for layer in found.layers] == [
        ("second", ["int8", "float16"]),
        ("first", ["float16"]),
    ]


def test_parting_the_layers_changes_no_figure(five_convolutions, plans, folder, random_samples, monkeypatch):
    model = five_convolutions()
    samples = random_samples(model, 4)
    made = plans(model, samples, 8)
    together = sensitivity(made, samples, folder())
    monkeypatch.setattr(room, "PROBE_BYTES", 1)

    told = []
    apart = sensitivity(made, samples, folder(), on_part=lambda: told.append(1))

    assert len(parts(made["int8"])) == 7
    assert len(told) == 7 * 4
    for one, other in zip(together.layers, apart.layers, strict=True):
        assert one.node == other.node
        assert one.effects["int8"].sqnr_db == pytest.approx(other.effects["int8"].sqnr_db, abs=0.01)


def test_the_output_that_loses_most_counts(build, normal_form, node, planned, folder, random_samples):
    random = np.random.default_rng(0)
    constants = {name: random.normal(size=(6, 3)).astype(np.float32) for name in "wv"}
    nodes = [node("Gemm", "x w", "y", name="left"), node("Gemm", "z v", "u", name="right")]
    shapes = {"x": [1, 6], "z": [1, 6]}, {"y": [1, 3], "u": [1, 3]}
    model = normal_form(build(nodes, *shapes, constants))
    samples = random_samples(model, 8)
    found = sensitivity({"int8": planned(model, samples)}, samples, folder())

    (effect,) = (layer.effects["int8"] for layer in found.layers if layer.node == "right")
    assert 20 < effect.sqnr_db < 60
    assert (effect.kl_divergence, effect.agreement) == (0.0, 1.0)


def test_outputs_that_are_no_classes_have_no_divergence(build, normal_form, node, planned, folder, random_samples):
    constants = {"k": np.random.default_rng(0).normal(size=(2, 3, 3, 3)).astype(np.float32)}
    model = normal_form(build([node("Conv", "x k", "y")], {"x": [1, 3, 8, 8]}, {"y": [1, 2, 6, 6]}, constants))
    samples = random_samples(model, 2)
    found = sensitivity({"int8": planned(model, samples)}, samples, folder())

    effect = found.layers[0].effects["int8"]
    assert (effect.kl_divergence, effect.agreement, effect.metric) == (None, None, None)


def test_divergence_of_logits_is_that_of_their_softmax():
    random = np.random.default_rng(0)
    p, q = random.normal(0, 20, (5, 7)), random.normal(0, 20, (5, 7))

    expected = np.sum(softmax(p, 1) * (log_softmax(p, 1) - log_softmax(q, 1)), axis=1)
    assert kl_divergence(p, q) == pytest.approx(expected)


def test_classes_that_are_masked_in_both_count_for_nothing():
    p, q = np.array([[1.0, 2.0, -np.inf]]), np.array([[1.5, 2.0, -np.inf]])

    assert kl_divergence(p, q) == pytest.approx(kl_divergence(p[:, :2], q[:, :2]))


def test_divergence_of_shares_is_that_of_themselves():
    random = np.random.default_rng(0)
    p, q = softmax(random.normal(size=(5, 7)), 1), softmax(random.normal(size=(5, 7)), 1)

    assert kl_divergence(p, q) == pytest.approx(entropy(p, q, axis=1))


def test_samples_are_needed(two_gemms, planned, folder):
    model, _ = two_gemms

    with pytest.raises(InputError, match="There are no samples to run"):
        sensitivity({"int8": planned(model)}, [], folder())


def test_rules_at_another_width_keep_everything_else(contract):
    wide = at_bits(contract, 16)

    assert at_bits(contract, 8) is contract
    assert takes_bits(wide, 16)
    assert not takes_bits(wide, 8)
    assert not takes_bits(contract, 16)
    assert (wide.bias, wide.placement) == ("float", contract.placement)
    for rule, widened in zip(contract.rules, wide.rules, strict=True):
        for index, scheme in rule.inputs.items():
            assert widened.inputs[index] == replace(scheme, integer=replace(scheme.integer, bits=16))


def test_a_contract_with_16_bits_anywhere_takes_them():
    output = Scheme(IntegerType(16), symmetric=True, granularity=PerTensor())
    rules = (OpRule("Conv"), OpRule("Add", output=output))

    assert takes_bits(QuantContract("npu", "int8", (13, 25), "float", "inputs", rules), 16)
