"""Figures reach the report's fields as they were measured, rounded, and null where there is none."""

from dataclasses import dataclass

import numpy as np
import pytest

from qdeploy.backend import Artifact, Evidence, Layer
from qdeploy.parity.compare import Comparison
from qdeploy.parity.latency import Latency, speedup
from qdeploy.parity.metrics import difference
from qdeploy.parity.verdict import Verdict
from qdeploy.report import rows, schema

X = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
Y = np.rint(X * 8) / np.float32(8)


@dataclass(frozen=True)
class Options:
    threads: int = 2
    devices: tuple[str, ...] = ("a", "b")
    fast: bool = True


def test_options_are_plain_json():
    assert rows.plain(Options()) == {"threads": 2, "devices": ["a", "b"], "fast": True}


def test_accuracy_is_that_of_the_first_output():
    other = difference(X, X + 1)
    comparison = Comparison(30, {"y": difference(X, Y), "z": other}, 0.9, 0.8666666666, 1 / 30, (-1 / 7, 1 / 3), "ab12")

    fields = rows.accuracy_fields(comparison)

    x, y, z = (array.astype(np.float64) for array in (X, Y, X + 1))
    assert fields == {
        "metric": 0.866667,
        "drop": 0.033333,
        "drop_interval": (-0.142857, 0.333333),
        "agreement": round((X.argmax(1) == Y.argmax(1)).mean(), 6),
        "cosine": pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-6),
        "sqnr_db": pytest.approx(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()), abs=1e-6),
        "max_abs_error": pytest.approx(np.abs(x - y).max(), abs=1e-6),
        "outputs": {
            "y": schema.Output(
                sqnr_db=fields["sqnr_db"],
                cosine=fields["cosine"],
                max_abs_error=fields["max_abs_error"],
                equal=round((X == Y).mean(), 6),
            ),
            "z": schema.Output(
                sqnr_db=round(10 * np.log10((x**2).sum() / ((x - z) ** 2).sum()), 6),
                cosine=round((x * z).sum() / np.linalg.norm(x) / np.linalg.norm(z), 6),
                max_abs_error=round(np.abs(x - z).max(), 6),
                equal=0.0,
            ),
        },
        "evaluation_samples": 30,
        "evaluation_digest": "ab12",
    }
    assert schema.Target(target="t", precision="int8", status="pass", **fields).drop == 0.033333


def test_what_was_not_measured_is_null():
    fields = rows.accuracy_fields(Comparison(3, {"ids": difference(np.arange(3), np.arange(3))}))

    assert {name for name, value in fields.items() if value is None} == {
        *("metric", "drop", "drop_interval", "agreement", "cosine", "sqnr_db", "max_abs_error", "evaluation_digest")
    }
    assert rows.speed_fields(None, 1, 1) == {}


def test_an_infinite_sqnr_reaches_the_schema_as_null_with_its_value_in_the_reason():
    fields = rows.accuracy_fields(Comparison(3, {"y": difference(X, X)}))

    row = schema.Target(target="t", precision="fp32", status="pass", reason="Equal.", **fields)

    assert row.sqnr_db is None
    assert row.max_abs_error == 0.0
    assert row.reason == "Equal. Not finite, hence null: sqnr_db = inf."


def test_speed_is_given_beside_its_baseline():
    mine = Latency(tuple(np.linspace(1.0, 1.2, 20)))
    baseline = Latency(tuple(np.linspace(3.0, 3.3, 20)))

    fields = rows.speed_fields((mine, baseline), 4, 8)

    latency = fields["latency_ms"]
    assert (latency.p50, latency.p90, latency.p99) == (1.1, 1.18, 1.198)
    assert (latency.runs, latency.threads, latency.batch) == (20, 4, 8)
    assert latency.quantiles == pytest.approx(np.linspace(1.0, 1.2, 21), abs=1e-4)
    assert latency.p50_interval[0] < 1.1 < latency.p50_interval[1]
    assert fields["baseline_latency_ms"].p50 == 3.15
    assert fields["speedup"] == round(3.15 / 1.1, 4)
    assert fields["speedup_interval"] == pytest.approx(speedup(baseline, mine)[1], abs=1e-4)


def test_operators_are_counted_by_what_they_compute_in():
    kinds = ["int8", "fp32", "int8", "fp16", "unknown", "int8"]
    layers = tuple(Layer(f"n{i}", "Conv", "", (), None, (), kind) for i, kind in enumerate(kinds))

    found = rows.quantized_ops(Artifact("t", "int8", None, "m", layers))

    assert list(found.items()) == [("float", 2), ("int8", 3), ("unknown", 1)]


def test_an_artifacts_size_is_that_of_all_its_own_files(tmp_path):
    (tmp_path / "package" / "layers.json").mkdir(parents=True)
    (tmp_path / "model.onnx").write_bytes(bytes(100))
    (tmp_path / "package" / "weights").write_bytes(bytes(1000))
    (tmp_path / "package" / "layers.json" / "own").write_bytes(bytes(10))
    artifact = Artifact("t", "int8", tmp_path, "model.onnx", ())
    before = rows.artifact_bytes(artifact, besides="layers.json")
    (tmp_path / "layers.json").write_bytes(bytes(5))

    assert before == rows.artifact_bytes(artifact, besides="layers.json") == 1110


def test_remarks_follow_the_verdict():
    fields = rows.verdict_fields(Verdict("fail", "Too bad."), Evidence.SIMULATED, ["On few samples."])

    assert fields == {"status": "fail", "evidence": Evidence.SIMULATED, "reason": "Too bad. On few samples."}
    assert rows.verdict_fields(Verdict("pass", "Good."), Evidence.EXECUTED, [])["reason"] == "Good."


def test_the_module_is_the_reference_of_its_onnx_model():
    eager = rows.eager_row(Comparison(30, {"y": difference(X, Y)}))

    assert eager.max_abs_error == pytest.approx(np.abs(X - Y).max(), rel=1e-6)
    assert eager.agreement == (X.argmax(1) == Y.argmax(1)).mean()
