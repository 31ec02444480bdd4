"""A fault planted in a network: exactly its layer is named, with its cause and the flag that mends it."""

import numpy as np
import pytest

from qdeploy.analysis.causes import FEWEST_LEVELS, Measured, causes_of, interval, rms_of
from qdeploy.analysis.layers import layer_errors
from qdeploy.analysis.operands import layers_of
from qdeploy.calibration_readers.minmax import MinMax
from qdeploy.calibration_readers.mse import Mse
from qdeploy.calibration_readers.percentile import Percentile
from qdeploy.graph import load_graph
from qdeploy.plan import plan
from qdeploy.samples.source import Sample

NOTHING_MEASURED = Measured(40.0, None, None)


@pytest.fixture
def causes(planned, counted, folder, random_samples, contract):
    """The causes that the layers of a model are found to lose by."""

    def find(model, samples=None, *, rules=contract):
        samples = random_samples(model, 16) if samples is None else samples
        statistics = counted(model, samples)
        return layer_errors(planned(model, samples, rules=rules), statistics, samples, folder()).causes

    return find


def hundredfold(weights):
    weights["k2"][5] *= 100
    weights["b2"][5] *= 100


def test_one_channel_a_hundred_times_larger_under_one_scale(five_convolutions, causes, contract):
    found = causes(five_convolutions(hundredfold), rules=contract.with_per_tensor_weights())

    assert {cause.layer for cause in found} == {"conv2"}
    weights, activation = found
    assert (weights.kind, weights.tensor, weights.loses) == ("weight channels", "k2", "conv2")
    assert "Channel 5 of 'k2'" in weights.explanation
    assert weights.flag == "--granularity per-channel, or --recover equalization"
    assert activation.kind == "activation channels"


def test_the_levels_of_a_typical_weight_channel_are_counted(five_convolutions, causes, contract):
    kept = {}

    def damage(weights):
        hundredfold(weights)
        kept.update(weights)

    found = causes(five_convolutions(damage), rules=contract.with_per_tensor_weights())

    peaks = np.abs(kept["k2"].reshape(16, -1)).max(axis=1)
    assert found[0].levels == pytest.approx(np.median(peaks) / (peaks.max() / 127) * 2, rel=1e-3)


def test_one_channel_a_hundred_times_larger_with_a_scale_each_harms_the_activation(five_convolutions, causes):
    (found,) = causes(five_convolutions(hundredfold))

    assert (found.kind, found.layer, found.loses, found.tensor) == ("activation channels", "conv2", "conv3", "r2")
    assert "Channel 5 of 'r2'" in found.explanation
    assert found.levels < FEWEST_LEVELS
    assert found.flag == "--recover equalization"


def test_one_channel_far_from_zero_is_found_where_it_is_written(five_convolutions, causes):
    def damage(weights):
        weights["b2"][7] = 150

    (found,) = causes(five_convolutions(damage))

    assert (found.layer, found.kind) == ("conv2", "activation channels")
    assert "Channel 7 of 'r2' lies" in found.explanation
    assert found.flag == "--keep conv2 --keep conv3"


@pytest.mark.parametrize(
    ("operator", "flag"), [("LayerNormalization", "--recover smoothquant"), (None, "--keep reader")]
)
def test_channels_that_no_weight_writes_are_left_to_the_reader(build, normal_form, node, causes, operator, flag):
    random = np.random.default_rng(0)
    constants = {"w": random.normal(size=(16, 4)), "s": np.where(np.arange(16) == 3, 100, 1), "o": np.zeros(16)}
    constants = {name: array.astype(np.float32) for name, array in constants.items()}
    before = [node(operator, "x s o", "h", name="norm")] if operator else []
    nodes = [*before, node("Gemm", f"{'h' if operator else 'x'} w", "y", name="reader")]
    model = normal_form(build(nodes, {"x": [4, 16]}, {"y": [4, 4]}, constants))
    samples = [Sample({"x": random.normal(size=(4, 16)).astype(np.float32)}) for _ in range(16)]
    if not operator:
        for sample in samples:
            sample.inputs["x"][:, 3] *= 100
    (found,) = causes(model, samples)

    assert (found.kind, found.layer, found.flag) == ("activation channels", "norm" if operator else "reader", flag)


def test_the_layer_before_what_only_moves_values_is_at_fault(build, normal_form, node, causes):
    random = np.random.default_rng(0)
    weights = {"k2": random.normal(size=(16, 3, 3, 3)), "b2": random.normal(size=16), "w": random.normal(size=(16, 4))}
    hundredfold(weights)
    nodes = [
        node("Conv", "x k2 b2", "c", name="conv"),
        node("Relu", "c", "r"),
        node("MaxPool", "r", "m", kernel_shape=[6, 6]),
        node("Flatten", "m", "f"),
        node("Gemm", "f w", "y", name="classifier"),
    ]
    constants = {name: array.astype(np.float32) for name, array in weights.items()}
    model = normal_form(build(nodes, {"x": [1, 3, 8, 8]}, {"y": [1, 4]}, constants))
    found = causes(model)

    assert {(cause.kind, cause.layer, cause.loses) for cause in found} == {
        ("activation channels", "conv", "classifier")
    }


@pytest.mark.parametrize(
    ("spiked", "flag"),
    [(1, "--reader percentile:99.9, or --keep only"), (16, "--keep only")],
    ids=["rare enough to be clipped", "too frequent"],
)
def test_outliers_take_the_levels_of_all_other_values(build, normal_form, node, causes, random_samples, spiked, flag):
    constants = {"k": np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)}
    nodes = [node("Conv", "x k", "y", name="only")]
    model = normal_form(build(nodes, {"x": [1, 3, 16, 16]}, {"y": [1, 4, 14, 14]}, constants))
    samples = random_samples(model, 16)
    for sample in samples[:spiked]:
        sample.inputs["x"][0, 0, 3, 3] = 500
    (found,) = causes(model, samples)

    assert (found.kind, found.layer, found.tensor, found.flag) == ("outliers", "only", "x", flag)
    assert "'x' reaches 500, while 99 % of its values lie from -2." in found.explanation


def test_the_flag_for_rare_outliers_mends_them(two_gemms, counted, folder, random_samples, contract):
    model, _ = two_gemms
    samples = random_samples(model, 1000)
    samples[0].inputs["x"][0, 0] = 500
    statistics = counted(model, samples)

    def kinds(reader):
        found = layer_errors(plan(model, statistics, contract, reader), statistics, samples[1:9], folder())
        return [(cause.kind, cause.flag) for cause in found.causes], found.layers[0].own_db

    found, harmed = kinds(MinMax())
    assert found[0] == ("outliers", "--reader percentile:99.9, or --keep first")
    found, mended = kinds(Percentile(99.9))
    assert found == []
    assert mended > harmed + 20


def test_a_tensor_that_several_layers_read_is_at_fault_once(build, normal_form, node, causes):
    random = np.random.default_rng(0)
    constants = {name: random.normal(size=(8, 4)).astype(np.float32) for name in "wv"}
    nodes = [node("Gemm", "x w", "y", name="left"), node("Gemm", "x v", "z", name="right")]
    model = normal_form(build(nodes, {"x": [1, 8]}, {"y": [1, 4], "z": [1, 4]}, constants))
    samples = [Sample({"x": random.normal(size=(1, 8)).astype(np.float32)}) for _ in range(64)]
    for sample in samples:
        sample.inputs["x"][0, 2] = 1000
    (found,) = causes(model, samples)

    assert (found.loses, found.tensor) == ("left", "x")


def test_a_mask_is_told_from_an_outlier(build, normal_form, node, causes):
    random = np.random.default_rng(0)
    constants = {"w": random.normal(size=(8, 8)).astype(np.float32)}
    model = normal_form(build([node("Gemm", "x w", "y", name="scores")], {"x": [1, 8]}, {"y": [1, 8]}, constants))
    samples = [Sample({"x": random.normal(size=(1, 8)).astype(np.float32)}) for _ in range(32)]
    for sample in samples:
        sample.inputs["x"][0, 5:] = -10000
    (found,) = causes(model, samples)

    assert (found.kind, found.layer, found.flag) == ("mask", "scores", "--keep scores")
    assert "'x' reaches -1e+04, and every other value lies within" in found.explanation


def test_a_range_that_cuts_off_what_matters(two_gemms, counted, folder, random_samples, contract):
    model, _ = two_gemms
    samples = random_samples(model, 1000)
    statistics = counted(model, samples)

    def found(reader):
        return layer_errors(plan(model, statistics, contract, reader), statistics, samples[:64], folder()).causes

    (first, second) = found(Percentile(90))
    assert (first.kind, first.layer, first.tensor, first.flag) == ("clipping", "first", "x", "--reader mse")
    assert (second.layer, second.loses, second.tensor) == ("first", "second", "r")
    assert first.explanation.startswith("Its range, -1.6")
    assert found(Mse()) == found(MinMax()) == ()


def test_noise_that_is_mostly_a_shift_wants_a_bias(two_gemms, planned, counted, random_samples):
    model, _ = two_gemms
    samples = random_samples(model)
    plan, statistics, graph = planned(model, samples), counted(model, samples), load_graph(model.path)
    layer = layers_of(graph, plan)[0]

    def kinds(weights_db, shift):
        found = causes_of(layer, graph, plan, statistics, Measured(30.0, weights_db, shift))
        return [(cause.kind, cause.flag) for cause in found]

    assert kinds(25.0, 0.9) == [("bias shift", "--recover bias-correction")]
    assert kinds(45.0, 0.9) == kinds(25.0, 0.2) == kinds(None, None) == []


def test_what_is_not_finite_is_kept(two_gemms, planned, counted, random_samples):
    model, _ = two_gemms
    samples = random_samples(model)
    plan, graph = planned(model, samples), load_graph(model.path)
    layer = layers_of(graph, plan)[0]
    (found,) = causes_of(layer, graph, plan, counted(model, samples), Measured(-np.inf, None, None))

    assert (found.kind, found.layer, found.flag) == ("non-finite", "first", "--keep first")


def test_intervals_and_rms_are_those_of_the_values(statistics_of):
    values = np.random.default_rng(0).normal(3.0, 1.0, 100_000)
    tensor = statistics_of(values)

    low, high = interval(tensor, 99.0)
    assert (low, high) == (0.0, pytest.approx(np.quantile(values, 0.995), rel=0.016))
    assert rms_of(tensor) == pytest.approx(np.sqrt(np.mean(values**2)), rel=0.001)
