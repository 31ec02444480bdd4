"""Two reports side by side: what is better, what is worse, what counts, and what cannot be compared."""

import dataclasses
import io
import json
import math

import pytest

from qdeploy.errors import InputError
from qdeploy.report import schema, terminal
from qdeploy.report.comparison import compare, limits
from qdeploy.report.contents import Contents

ALLOWED = limits(0.01, 3.0, 1.1, 1.05)


@pytest.fixture
def base(contents) -> Contents:
    """The fixture's report with its passed target alone."""
    return dataclasses.replace(
        contents, report=contents.report.model_copy(update={"targets": contents.report.targets[:1]})
    )


def changed(base: Contents, report=(), **fields) -> Contents:
    """The same with other fields of its only target, or of the report."""
    row = base.report.targets[0].model_copy(update=fields)
    return dataclasses.replace(base, report=base.report.model_copy(update={"targets": (row,), **dict(report)}))


def figures(new: Contents, base: Contents, allowed=ALLOWED):
    (target,) = compare(new, base, allowed, ("new", "base")).targets
    return {figure.name: figure for figure in target.figures}


def timed(p50: float, low: float, high: float, **fields) -> schema.Latency:
    return schema.Latency(p50=p50, p90=2 * p50, p99=3 * p50, runs=100, p50_interval=(low, high), **fields)


def test_a_bundle_is_no_worse_than_itself(base):
    found = compare(base, base, ALLOWED, ("new", "base"))

    assert (found.exit_code, found.beyond, found.notes, found.added, found.missing) == (0, (), (), (), ())
    assert {figure.standing for figure in found.targets[0].figures} == {"same"}
    assert [figure.name for figure in found.targets[0].figures] == [
        *("metric", "agreement", "sqnr_db", "size_bytes", "latency_ms")
    ]
    assert found.targets[0].layers == ()


@pytest.mark.parametrize(
    ("metric", "standing", "beyond"),
    [(0.9922, "better", False), (0.9822, "same", False), (0.9722, "worse", False), (0.9721, "worse", True)],
)
def test_a_loss_of_accuracy_counts_beyond_the_limit(base, metric, standing, beyond):
    found = compare(changed(base, metric=metric), base, ALLOWED, ("new", "base"))

    figure = found.targets[0].figures[0]
    assert (figure.standing, figure.beyond, figure.change) == (standing, beyond, pytest.approx(metric - 0.9822))
    assert found.exit_code == int(beyond)


def test_the_interval_of_a_change_is_that_of_two_independent_drops(base):
    # Of normal distributions: the deviations of a difference add up in squares.
    new = changed(base, metric=0.9722, drop=0.0122, drop_interval=(0.0082, 0.0152))

    figure = figures(new, base)["metric"]

    low, high = -0.01 - math.hypot(0.003, 0.0044), -0.01 + math.hypot(0.004, 0.0045)
    assert figure.interval == pytest.approx((low, high), abs=2e-6)


def test_accuracies_of_two_float_models_have_no_interval(base):
    new = changed(base, metric=0.95, drop=0.0022)

    assert figures(new, base)["metric"].interval is None


def test_sqnr_counts_only_where_there_is_no_metric(base):
    noisy = changed(base, sqnr_db=20.0)
    assert not figures(noisy, base)["sqnr_db"].beyond

    unlabelled = {"metric": None, "drop": None, "drop_interval": None}
    figure = figures(changed(noisy, **unlabelled), changed(base, **unlabelled))["sqnr_db"]
    assert (figure.limit, figure.change, figure.beyond) == (3.0, -11.25, True)


@pytest.mark.parametrize(
    ("size", "standing", "beyond"), [(20_000, "better", False), (28_875, "worse", False), (28_900, "worse", True)]
)
def test_growth_counts_beyond_the_limit(base, size, standing, beyond):
    figure = figures(changed(base, size_bytes=size), base)["size_bytes"]

    assert (figure.standing, figure.beyond, figure.change) == (standing, beyond, pytest.approx(size / 27_500, abs=1e-4))


@pytest.mark.parametrize(
    ("latency", "standing", "beyond"),
    [
        (timed(0.20, 0.19, 0.21), "better", False),
        (timed(0.27, 0.265, 0.275), "worse", False),
        (timed(0.30, 0.29, 0.31), "worse", True),
        (timed(0.30, 0.20, 0.40), "same", False),  # the interval of the ratio, 0.77 to 1.67, holds 1
    ],
)
def test_a_slowdown_counts_if_it_is_certain(base, latency, standing, beyond):
    figure = figures(changed(base, latency_ms=latency), base)["latency_ms"]

    assert (figure.standing, figure.beyond) == (standing, beyond)
    assert figure.interval == pytest.approx((latency.p50_interval[0] / 0.26, latency.p50_interval[1] / 0.24), abs=1e-4)


def test_latencies_of_two_machines_are_not_compared(base):
    new = changed(base, {"environment": {"processor": "another"}}, latency_ms=timed(9.0, 8.9, 9.1))

    found = compare(new, base, ALLOWED, ("new", "base"))

    assert "latency_ms" not in [figure.name for figure in found.targets[0].figures]
    assert found.notes == (
        "Latencies are not compared: they were measured on different processors, another and an unknown one.",
    )
    assert found.exit_code == 0


def test_latencies_of_other_threads_are_not_compared(base):
    found = compare(changed(base, latency_ms=timed(9.0, 8.9, 9.1, threads=1)), base, ALLOWED, ("new", "base"))

    assert found.notes == ("Some latencies are not compared: they were measured with other threads or batches.",)
    assert found.exit_code == 0


def test_a_target_that_passed_and_fails_is_worse(base):
    found = compare(changed(base, status="fail", reason="It strays."), base, ALLOWED, ("new", "base"))

    assert found.beyond == ("ort-cpu:int8: fail, where it passed: It strays.",)


def test_a_target_that_failed_before_may_fail_again(base):
    failed = changed(base, status="fail", reason="It strays.")

    assert compare(failed, failed, ALLOWED, ("new", "base")).exit_code == 0


def test_a_target_that_is_missing_is_worse_and_a_new_one_is_not(base, contents):
    assert compare(contents, base, ALLOWED, ("new", "base")).added == ("tensorrt:int8",)
    found = compare(base, contents, ALLOWED, ("new", "base"))

    assert (found.missing, found.beyond) == (("tensorrt:int8",), ("tensorrt:int8: is missing",))
    assert found.exit_code == 1


def test_two_bundles_of_one_target_each_are_compared_whatever_the_targets(base):
    found = compare(changed(base, target="coreml", precision="int8"), base, ALLOWED, ("new", "base"))

    assert [each.name for each in found.targets] == ["coreml:int8 against ort-cpu:int8"]
    assert found.missing == ()


def test_layers_that_compute_in_something_else_are_named(base):
    conv, softmax = base.layers["ort-cpu"]
    layers = (dataclasses.replace(conv, precision="fp32"), dataclasses.replace(softmax, node="other"))

    (target,) = compare(dataclasses.replace(base, layers={"ort-cpu": layers}), base, ALLOWED, ("new", "base")).targets

    assert [(each.node, each.base, each.precision) for each in target.layers] == [
        ("conv1", "int8", "fp32"),
        ("other", None, "fp32"),
        ("softmax", "fp32", None),
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"evaluation_digest": "c2d3"},
            "ort-cpu:int8: measured on different evaluation samples (450 here, 450 in the one to compare with). Export",
        ),
        (
            {"evaluation_digest": "c2d3", "evaluation_samples": 225},
            "(225 here, 450 in the one to compare with). With --max-drop and no --recover, half of the samples serve",
        ),
        ({"evaluation_digest": None}, "a report does not say. It was written by an older qdeploy. Export both"),
    ],
)
def test_other_evaluation_samples_cannot_be_compared(base, fields, message):
    with pytest.raises(InputError) as caught:
        compare(changed(base, **fields), base, ALLOWED, ("new", "base"))
    assert message in str(caught.value)


def test_other_metrics_cannot_be_compared(base):
    reference = base.report.reference.model_copy(update={"metric": schema.Metric(name="top5", value=0.99, samples=450)})

    with pytest.raises(InputError, match="Accuracy is top5 here, and top1 in the bundle to compare with"):
        compare(changed(base, {"reference": reference}), base, ALLOWED, ("new", "base"))


def test_bundles_without_a_target_in_common_cannot_be_compared(contents):
    renamed = tuple(row.model_copy(update={"precision": "fp16"}) for row in contents.report.targets)
    other = dataclasses.replace(contents, report=contents.report.model_copy(update={"targets": renamed}))

    with pytest.raises(
        InputError, match="no target in common: ort-cpu:fp16, tensorrt:fp16 here, ort-cpu:int8, tensorrt"
    ):
        compare(other, contents, ALLOWED, ("new", "base"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((math.nan, 3, 1.1, 1.05), "--max-accuracy-loss cannot be nan. Give a number, as in 0.01."),
        ((0.01, math.inf, 1.1, 1.05), "--max-sqnr-loss cannot be inf. Give a number of decibels, as in 3."),
        ((0.01, 3, 0.0, 1.05), "--max-slowdown cannot be 0. Give a ratio above 0, as in 1.1."),
        ((0.01, 3, 1.1, -1.0), "--max-growth cannot be -1. Give a ratio above 0, as in 1.05."),
    ],
)
def test_limits_that_make_no_sense_are_refused(values, message):
    with pytest.raises(InputError) as caught:
        limits(*values)
    assert str(caught.value) == message


def test_the_terminal_says_what_is_worse(base):
    new = changed(base, metric=0.95, latency_ms=timed(0.5, 0.49, 0.51), status="fail", reason="Bad.")
    layers = (dataclasses.replace(base.layers["ort-cpu"][0], precision="fp32"), base.layers["ort-cpu"][1])
    found = compare(dataclasses.replace(new, layers={"ort-cpu": layers}), base, ALLOWED, ("pr", "main"))
    file = io.StringIO()

    terminal.show_differences(found, file)

    shown = file.getvalue()
    assert shown.startswith("digits, pr against main: Worse than allowed: 3 findings.\n")
    for line in (
        "worse: ort-cpu:int8: fail, where it passed: Bad.",
        "worse: ort-cpu:int8: accuracy went from 0.9822 to 0.9500 (-0.0322; a loss of 0.01 is allowed)",
        "worse: ort-cpu:int8: latency went from 0.250 ms to 0.500 ms (2.000×; 1.1× is allowed)",
        "ort-cpu:int8: pass became fail",
        "ort-cpu:int8: layers: conv1 int8 → fp32",
    ):
        assert line in shown.splitlines()
    assert "worse!" in shown


def test_the_differences_are_data_too(base):
    found = compare(changed(base, metric=0.95), base, ALLOWED, ("new", "base"))

    data = json.loads(found.text())

    assert data["schema"] == 1
    assert data["limits"] == {"accuracy_loss": 0.01, "sqnr_loss": 3.0, "slowdown": 1.1, "growth": 1.05}
    assert data["targets"][0]["figures"][0] == {
        "name": "metric",
        "title": "accuracy",
        "value": 0.95,
        "base": 0.9822,
        "change": -0.0322,
        "interval": None,
        "limit": 0.01,
        "standing": "worse",
        "beyond": True,
    }
