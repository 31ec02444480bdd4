"""report, parity and bench: what is done with a finished bundle, which none of them changes."""

import json
import shutil

import numpy as np
import pytest


@pytest.fixture
def unchanged(bundle):
    """Asserts afterwards that the bundle is as it was."""
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    yield
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before


pytestmark = pytest.mark.usefixtures("unchanged")


def test_a_report_is_shown(bundle, qdeploy):
    ended = qdeploy("report", bundle)

    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("net: 2 of 2 targets passed.\n")


def test_a_report_as_json_is_the_file(bundle, qdeploy):
    ended = qdeploy("report", bundle, "--json")

    assert ended.out == (bundle / "report.json").read_text()


def test_a_report_as_a_page_is_the_bundles(bundle, tmp_path, qdeploy):
    ended = qdeploy("report", bundle, "-o", tmp_path / "page.html", "--quiet")

    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert (tmp_path / "page.html").read_text() == (bundle / "report.html").read_text()
    again = qdeploy("report", bundle, "-o", tmp_path / "page.html")
    assert again.err.startswith(f"error: {tmp_path / 'page.html'} exists already.\n")
    assert qdeploy("report", bundle, "-o", tmp_path / "page.html", "--force", "--quiet").code == 0


def test_a_report_of_a_failure_exits_as_the_export_did(problem, tmp_path, qdeploy):
    output = tmp_path / "failed"
    command = ("quantize", problem / "net.onnx", "--target", "ort-cpu", "--calibration", problem / "samples.npz")
    assert qdeploy(*command, "--max-drop", "-1", "--recover", "none", "--quiet", "-o", output).code == 1

    assert qdeploy("report", output).code == 1


def test_parity_on_the_golden_samples(bundle, qdeploy):
    ended = qdeploy("parity", bundle, "--json")

    assert ended.code == 0
    rows = json.loads(ended.out)["targets"]
    assert [(row["target"], row["precision"], row["status"]) for row in rows] == [
        ("ort-cpu", "int8", "pass"),
        ("ort-cpu", "fp32", "pass"),
    ]
    assert {row["evaluation_samples"] for row in rows} == {64}
    assert rows[1]["max_abs_error"] < 1e-5


def test_parity_on_other_samples(bundle, problem, qdeploy):
    ended = qdeploy("parity", bundle, "--evaluation", problem / "samples.npz", "--target", "ort-cpu-fp32", "--json")

    (row,) = json.loads(ended.out)["targets"]
    assert (row["precision"], row["metric"], row["evaluation_samples"]) == ("fp32", 1.0, 120)


def test_parity_fails_beyond_the_budget(bundle, problem, qdeploy):
    ended = qdeploy("parity", bundle, "--evaluation", problem / "samples.npz", "--max-drop", "-0.5")

    assert ended.code == 1
    assert "failed: ort-cpu:int8, ort-cpu:fp32." in ended.out


def test_parity_knows_the_bundles_targets(bundle, qdeploy):
    ended = qdeploy("parity", bundle, "--target", "ort-cpi")

    assert (ended.code, ended.out, ended.err) == (
        2,
        "",
        f"error: The bundle {bundle} has no target 'ort-cpi'.\nDid you mean 'ort-cpu'? Known: ort-cpu, ort-cpu-fp32.\n",
    )


def test_bench_of_a_bundle(bundle, qdeploy):
    ended = qdeploy("bench", bundle)

    assert (ended.code, ended.err) == (0, "")
    titles, *rows = ended.out.splitlines()
    assert titles.split() == ["p50", "ms", "p90", "ms", "p99", "ms", "runs", "speed-up"]
    assert [row.split()[0] for row in rows] == ["float", "ort-cpu", "ort-cpu-fp32"]
    assert "×" not in rows[0]
    assert all("× [" in row for row in rows[1:])


def test_bench_of_a_file_as_json(problem, qdeploy):
    found = json.loads(qdeploy("bench", problem / "net.onnx", "--json").out)

    times = found["latency_ms"]["float"]
    assert found["schema"] == 1
    assert 0 < times["p50"] <= times["p90"] <= times["p99"]
    assert times["runs"] >= 20


def test_bench_quietly(problem, qdeploy):
    assert qdeploy("bench", problem / "net.onnx", "--quiet").out == ""


@pytest.mark.parametrize("command", ["report", "parity"])
def test_what_is_no_bundle_is_refused(command, tmp_path, qdeploy):
    ended = qdeploy(command, tmp_path)

    what = f"{tmp_path} is not a qdeploy bundle: it holds no file bundle.json."
    assert (ended.code, ended.err) == (2, f"error: {what}\nName the folder that qdeploy export wrote with -o.\n")


def test_bench_of_what_is_not_there(qdeploy):
    ended = qdeploy("bench", "gone.onnx")

    assert (ended.code, ended.err) == (2, "error: There is no model file gone.onnx.\nCheck the path.\n")


def test_parity_of_a_bundle_that_was_copied(bundle, tmp_path, qdeploy):
    copied = shutil.copytree(bundle, tmp_path / "elsewhere")

    assert qdeploy("parity", copied, "--quiet").code == 0
    outputs = np.load(copied / "golden" / "outputs.npz")
    assert set(outputs.files) == {"float/logits", "ort-cpu/logits", "ort-cpu-fp32/logits"}
