import dataclasses
import json
from pathlib import Path

import pytest

from qdeploy.errors import InputError
from qdeploy.report import schema

GOLDEN = Path(__file__).with_name("report.json")


def target(**figures):
    return schema.Target(target="t", precision="int8", status="pass", **figures)


def test_the_bytes_of_a_report_are_those_of_the_golden_file(report):
    assert report.text().encode() == GOLDEN.read_bytes()


def test_a_report_survives_its_file(report):
    assert schema.Report.read(GOLDEN) == report


def test_layers_survive_their_file(tmp_path, layers):
    path = tmp_path / "layers.json"
    path.write_text(schema.Layers(layers=layers).text(), "utf-8")

    assert schema.Layers.read(path).layers == layers
    assert json.loads(path.read_text("utf-8")) == {
        "schema": 1,
        "layers": [{k: list(v) if isinstance(v, tuple) else v for k, v in vars(x).items()} for x in layers],
    }


def test_layers_have_every_field_of_a_layer(layers):
    (first, *_) = json.loads(schema.Layers(layers=layers).text())["layers"]

    assert list(first) == [field.name for field in dataclasses.fields(layers[0])]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_figure_that_is_not_finite_is_null_and_the_reason_gives_it(value):
    row = target(reason="It passed.", sqnr_db=value, drop=0.0)

    assert row.sqnr_db is None
    assert row.drop == 0.0
    assert row.reason == f"It passed. Not finite, hence null: sqnr_db = {value}."


def test_an_interval_with_an_infinite_end_is_null():
    row = target(speedup_interval=(1.0, float("inf")))

    assert row.speedup_interval is None
    assert row.reason == "Not finite, hence null: speedup_interval = inf."


def test_the_reason_is_given_once_however_often_the_row_is_read(tmp_path, report):
    row = target(sqnr_db=float("inf"))
    path = tmp_path / "report.json"
    path.write_text(report.model_copy(update={"targets": (row,)}).text(), "utf-8")

    assert schema.Report.read(path).targets == (row,)


def test_figures_outside_a_row_are_null_when_not_finite():
    assert schema.Eager(sqnr_db=float("inf"), max_abs_error=0.0).sqnr_db is None


def test_an_unmeasured_latency_cannot_be_written_as_nan():
    with pytest.raises(ValueError, match="p50"):
        schema.Latency(p50=float("nan"), p90=1.0, p99=1.0, runs=1)


def test_values_are_frozen_and_refuse_unknown_keys(report):
    with pytest.raises(ValueError, match="frozen"):
        report.qdeploy = "2"
    with pytest.raises(ValueError, match="Extra inputs"):
        target(acuracy=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data.update(schema=2),
            "was written by a newer qdeploy: schema 2, this one reads 1. Upgrade: pip",
        ),
        (lambda data: data.pop("schema"), "is no report of qdeploy: it states no schema."),
        (lambda data: data["targets"][0].update(status="good"), "targets.0.status: Input should be 'pass', 'fail' or"),
        (lambda data: data.update(model=3), "does not fit schema 1: model: Input should be a valid dictionary"),
        (lambda data: data.update(extra=3), "does not fit schema 1: extra: Extra inputs are not permitted."),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, message):
    data = json.loads(GOLDEN.read_text("utf-8"))
    change(data)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(data), "utf-8")

    with pytest.raises(InputError) as caught:
        schema.Report.read(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]"])
def test_a_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "report.json"
    path.write_bytes(content)

    with pytest.raises(InputError, match=r"report\.json"):
        schema.Report.read(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        schema.Report.read(tmp_path / "report.json")
