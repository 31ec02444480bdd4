"""Channel ranges, outliers and the cost of one scale, against plain numpy."""

import numpy as np
import pytest

from qdeploy.analysis.weights import weight_reports
from qdeploy.errors import InputError


@pytest.fixture
def report_of(build, normal_form, node, contract):
    """The report of a single Conv with the given weight [out, in, 1, 1]."""

    def make(weight, rules=contract):
        weight = np.asarray(weight, np.float32)
        out, width = weight.shape[:2]
        nodes = [node("Conv", "x k", "y", name="only")]
        model = normal_form(build(nodes, {"x": [1, width, 4, 4]}, {"y": [1, out, 4, 4]}, {"k": weight}))
        (report,) = weight_reports(model, rules)
        return report

    return make


def with_ranges(ranges):
    """A weight whose channels reach so far."""
    weight = np.random.default_rng(0).uniform(-0.9, 0.9, (len(ranges), 8, 1, 1))
    weight[:, 0] = 1
    return weight * np.reshape(ranges, (-1, 1, 1, 1))


@pytest.mark.parametrize(
    ("ranges", "ratio", "recommended"),
    [
        ([1, 1.5, 2], 2, "per-tensor"),
        ([1, 1.5, 2.5], 2.5, "per-channel"),
        ([0, 0, 3], 1, "per-tensor"),
        ([0], 1, "per-tensor"),
    ],
)
def test_ranges_that_differ_more_than_twofold_want_a_scale_each(report_of, ranges, ratio, recommended):
    report = report_of(with_ranges(ranges))

    assert report.channel_ratio == pytest.approx(ratio)
    assert report.recommended == recommended
    assert (report.channels, report.shape, report.weight) == (len(ranges), (len(ranges), 8, 1, 1), "k")
    assert (report.scheme, report.advice) == ("int8 symmetric per-channel (axis 0)", "")


def test_a_target_with_one_scale_gets_advice(report_of, contract):
    report = report_of(with_ranges([1, 10]), contract.with_per_tensor_weights())

    assert report.scheme == "int8 symmetric per-tensor"
    assert report.advice.startswith("--granularity per-channel, or --recover equalization")


def test_the_cost_of_either_granularity_is_measured_channel_by_channel(report_of, decibels):
    weight = with_ranges([0.05, 1, 4]).astype(np.float32)
    report = report_of(weight)

    def cost(scales):
        rounded = np.clip(np.rint(weight / scales), -127, 127) * scales
        ratios = [10 ** (-decibels([w], [r]) / 10) for w, r in zip(weight, rounded, strict=True)]
        return -10 * np.log10(np.mean(ratios))

    assert report.per_tensor_db == pytest.approx(cost(np.float32(4 / 127)), abs=0.01)
    scales = np.array([0.05, 1, 4], np.float32).reshape(3, 1, 1, 1) / 127
    assert report.per_channel_db == pytest.approx(cost(scales), abs=0.01)


def test_outliers_are_beyond_six_times_the_rms_of_their_channel(report_of):
    weight = np.random.default_rng(0).normal(size=(4, 500, 1, 1))
    weight[2, 7], weight[2, 8] = 40, -30
    weight[3] *= 100
    report = report_of(weight)

    rms = np.sqrt(np.mean(weight**2, axis=(1, 2, 3)))
    assert report.outliers == sum(np.sum(np.abs(w) > 6 * r) for w, r in zip(weight, rms, strict=True)) == 2
    assert report.peak_to_rms == pytest.approx(np.abs(weight).max() / np.sqrt(np.mean(weight**2)), rel=1e-5)


def test_every_weight_is_read_along_its_own_axis(build, normal_form, node, contract):
    random = np.random.default_rng(0)
    constants = {
        name: random.uniform(0.5, 1, shape) for name, shape in {"k": (3, 5, 2, 2), "g": (7, 80), "m": (7, 4)}.items()
    }
    constants["k"] *= np.array([1, 2, 3, 4, 100]).reshape(1, 5, 1, 1)
    constants["g"] *= np.arange(1, 8).reshape(7, 1)
    constants = {name: array.astype(np.float32) for name, array in constants.items()}
    nodes = [
        node("ConvTranspose", "x k", "t", name="up"),
        node("Flatten", "t", "f"),
        node("Gemm", "f g", "u", name="fc", transB=1),
        node("MatMul", "u m", "y", name="product"),
    ]
    model = normal_form(build(nodes, {"x": [1, 3, 3, 3]}, {"y": [1, 4]}, constants))
    reports = {report.node: report for report in weight_reports(model, contract, keep=("product",))}

    assert {name: report.channels for name, report in reports.items()} == {"up": 5, "fc": 7, "product": 4}
    largest = np.abs(constants["k"]).max(axis=(0, 2, 3))
    assert reports["up"].channel_ratio == pytest.approx(largest.max() / largest.min())
    assert (reports["up"].scheme, reports["product"].scheme) == (None, None)
    assert reports["fc"].scheme == "int8 symmetric per-channel (axis 0)"


def test_a_pattern_that_keeps_nothing_is_refused(five_convolutions, contract):
    with pytest.raises(InputError, match="Nothing in the model matches --keep 'conv9'"):
        weight_reports(five_convolutions(), contract, keep=("conv9",))
