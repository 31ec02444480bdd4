"""report, parity and bench: what is done with a finished bundle, which none of them changes."""

import json
import shutil

import numpy as np
import pytest

from tests.browser import shown_figures, wrong


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


def test_the_bundles_page_shows_the_figures_of_its_report(bundle, browser):
    browser.open((bundle / "report.html").as_uri())

    shown = shown_figures(browser)

    report = json.loads((bundle / "report.json").read_text())
    assert list(filter(None, (wrong(report, *each) for each in shown))) == []
    assert len(shown) > 25
    assert (browser.complaints, browser.requests) == ([], [(bundle / "report.html").as_uri()])


def test_a_bundle_is_compared_with_a_copy_of_itself(bundle, tmp_path, qdeploy):
    shutil.copytree(bundle, tmp_path / "base")

    ended = qdeploy("report", bundle, "--compare", tmp_path / "base")

    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("net, bundle against base: Nothing is worse than allowed.\n")


def test_a_comparison_fails_beyond_a_limit(bundle, tmp_path, qdeploy):
    ended = qdeploy(
        "report", bundle, "--compare", bundle, "--max-growth", "0.9", "--json", "-o", tmp_path / "page.html"
    )

    assert (ended.code, ended.err) == (1, "")
    found = json.loads(ended.out)
    assert len(found["beyond"]) == 2
    assert all(": size went from " in sentence for sentence in found["beyond"])
    assert "Worse than allowed: 2 findings." in (tmp_path / "page.html").read_text()


def test_limits_need_something_to_compare_with(bundle, qdeploy):
    ended = qdeploy("report", bundle, "--max-slowdown", "1.2")

    assert ended.code == 2
    assert ended.err == "error: A limit is given, but nothing to compare with.\nAdd --compare BUNDLE.\n"


def test_bundles_measured_on_other_samples_are_not_compared(bundle, problem, tmp_path, qdeploy):
    with np.load(problem / "samples.npz") as arrays:
        np.savez(tmp_path / "few.npz", image=arrays["image"][:90], labels=arrays["labels"][:90])
    command = ("quantize", problem / "net.onnx", "--target", "ort-cpu", "--calibration", problem / "samples.npz")
    assert qdeploy(*command, "--evaluation", tmp_path / "few.npz", "--quiet", "-o", tmp_path / "few").code == 0

    ended = qdeploy("report", tmp_path / "few", "--compare", bundle)

    assert (ended.code, ended.out) == (2, "")
    assert "ort-cpu:int8: measured on different evaluation samples (90 here, 120 in" in ended.err


@pytest.fixture
def analysis(problem, tmp_path, qdeploy, monkeypatch):
    """What analyze sensitivity --json printed, as a file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ("analyze", "sensitivity", problem / "net.onnx", "--calibration", problem / "samples.npz")
    path = tmp_path / "analysis.json"
    path.write_text(qdeploy(*command, "--bits", "8", "--json", "--quiet").out)
    return path


def test_an_analysis_joins_the_page(bundle, analysis, tmp_path, qdeploy):
    ended = qdeploy("report", bundle, "--analysis", analysis, "-o", tmp_path / "page.html", "--quiet")

    assert (ended.code, ended.err) == (0, "")
    assert "What each layer alone costs the output" in (tmp_path / "page.html").read_text()
    assert "What each layer alone costs the output" not in (bundle / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "coreml"}, "is of the target coreml, which this bundle does not have."),
        ({"layers": [{"node": "stem", "op_type": "Conv", "weight": "w", "effects": {}}]}, "has no layer 'stem'"),
        ({"analysis": "layers"}, "does not fit schema 1: analysis: Input should be 'sensitivity'."),
    ],
)
def test_an_analysis_of_something_else_is_refused(bundle, analysis, tmp_path, qdeploy, change, message):
    analysis.write_text(json.dumps({**json.loads(analysis.read_text()), **change}))

    ended = qdeploy("report", bundle, "--analysis", analysis, "-o", tmp_path / "page.html")

    assert ended.code == 2
    assert message in ended.err
    assert not (tmp_path / "page.html").exists()


def test_an_analysis_needs_a_page(bundle, analysis, qdeploy):
    assert qdeploy("report", bundle, "--analysis", analysis).err.startswith("error: --analysis is shown on the page of")


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


def test_a_change_of_each_file_is_found_and_named(bundle, tmp_path, qdeploy):
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    names = sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file())
    assert {"bundle.json", "report.json", "golden/outputs.npz", "ort-cpu/model.onnx"} <= set(names)

    for name in names:
        written = (copy / name).read_bytes()
        changed = bytearray(written)
        changed[len(changed) // 2] ^= 1
        (copy / name).write_bytes(changed)
        ended = qdeploy("report", copy)
        assert (ended.code, ended.out) == (2, ""), name
        assert f"{name} was changed" in ended.err
        (copy / name).write_bytes(written)
    assert qdeploy("report", copy, "--quiet").code == 0
