"""calibrate: statistics of one model, and several merged."""

import numpy as np
import pytest

from qdeploy.statistics import Statistics

ANEW = "Make it anew with qdeploy calibrate."


@pytest.fixture
def here(tmp_path, monkeypatch, problem):
    """An empty working folder with the samples in two halves."""
    images = np.load(problem / "samples.npz")["image"]
    np.savez(tmp_path / "first.npz", image=images[:50])
    np.savez(tmp_path / "second.npz", image=images[50:])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_statistics_are_saved_and_quantize_takes_them(here, problem, qdeploy):
    net, samples = problem / "net.onnx", problem / "samples.npz"

    ended = qdeploy("calibrate", net, "--calibration", samples, "-o", "stats.npz")

    assert (ended.code, ended.err) == (0, "")
    found = Statistics.load(here / "stats.npz")
    assert found.samples == 120
    assert f"stats.npz: {len(found.tensors)} tensors, 120 samples.\n" in ended.out
    assert ended.out.endswith("To use it: qdeploy export SOURCE --target NAME --statistics stats.npz\n")

    command = ("quantize", net, "--target", "ort-cpu", "--evaluation", samples, "--quiet")
    assert qdeploy(*command, "--statistics", "stats.npz", "-o", "a").code == 0
    assert qdeploy(*command, "--calibration", samples, "-o", "b").code == 0
    assert (here / "a/ort-cpu/model.onnx").read_bytes() == (here / "b/ort-cpu/model.onnx").read_bytes()


def test_parts_are_merged_to_what_one_calibration_gives(here, problem, qdeploy):
    net = problem / "net.onnx"
    for part in ("first", "second"):
        assert qdeploy("calibrate", net, "--calibration", f"{part}.npz", "-o", f"{part}.stats", "--quiet").code == 0
    whole = qdeploy("calibrate", net, "--calibration", problem / "samples.npz", "-o", "whole.stats", "--quiet")
    assert (whole.out, whole.err) == ("", "")

    ended = qdeploy("calibrate", "--merge", "second.stats", "first.stats", "-o", "merged.stats", "--quiet")

    assert (ended.code, ended.out, ended.err) == (0, "", "")
    merged, single = (Statistics.load(here / f"{name}.stats") for name in ("merged", "whole"))
    assert merged.sample_digests == single.sample_digests
    for name, tensor in single.tensors.items():
        np.testing.assert_array_equal(merged.tensors[name].histogram, tensor.histogram)
        np.testing.assert_array_equal(merged.tensors[name].channel_sum, tensor.channel_sum)


def test_few_samples_are_remarked_upon(here, problem, qdeploy):
    ended = qdeploy("calibrate", problem / "net.onnx", "--calibration", "first.npz", "--samples", "3", "-o", "s.npz")

    assert "note: 3 calibration samples; 500–2,000 diverse ones are usual.\n" in ended.out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "NET -o s.npz",
            "There is no calibration data.\nWrite qdeploy calibrate SOURCE --calibration DATA -o STATS.",
        ),
        (
            "NET NET --calibration first.npz -o s.npz",
            "There are 2 models.\nWrite qdeploy calibrate SOURCE --calibration DATA -o STATS.",
        ),
        (
            "NET --calibration first.npz -o second.npz",
            "second.npz exists already.\nName another output, or replace it with --force.",
        ),
        (
            "--merge gone.stats -o s.npz",
            "There is no statistics file gone.stats.\nMake one with qdeploy calibrate.",
        ),
        (
            "--merge first.npz -o s.npz",
            f"first.npz is not a statistics file of this version, or is damaged ('header').\n{ANEW}",
        ),
    ],
)
def test_mistakes(here, problem, qdeploy, command, message):
    ended = qdeploy("calibrate", command.replace("NET", str(problem / "net.onnx")))

    assert (ended.code, ended.out, ended.err) == (2, "", f"error: {message}\n")
    assert sorted(path.name for path in here.iterdir()) == ["first.npz", "second.npz"]


def test_workers_leave_the_same_file(qdeploy, problem, tmp_path):
    data = ("--calibration", problem / "samples.npz")
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"

    assert qdeploy("calibrate", problem / "net.onnx", *data, "-o", one).code == 0
    assert qdeploy("calibrate", problem / "net.onnx", *data, "-o", two, "--workers 2").code == 0

    assert one.read_bytes() == two.read_bytes()


def test_no_workers_are_refused(qdeploy, problem, tmp_path):
    data = ("--calibration", problem / "samples.npz")

    ended = qdeploy("calibrate", problem / "net.onnx", *data, "-o", tmp_path / "out.npz", "--workers 0")

    assert (ended.code, ended.err) == (2, "error: --workers cannot be 0.\nGive at least 1.\n")
