"""A disk that is full at any moment: one message that says which output was not written, and nothing left of it."""

import os
import resource
import shutil
import subprocess
import tempfile
from contextlib import contextmanager

import pytest

QUANTIZE = "quantize net.onnx --target ort-cpu --calibration samples.npz --quiet"
CALIBRATE = "calibrate net.onnx --calibration samples.npz --quiet -o stats.npz"


@pytest.fixture
def here(problem, tmp_path, monkeypatch):
    """The working folder, with the problem's files and a folder for temporary ones."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("net.onnx", "samples.npz"):
        shutil.copy(problem / name, folder)
    monkeypatch.chdir(folder)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return folder


@contextmanager
def files_of_at_most(size):
    """No file of this process may grow larger: the write that would make it so fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def check_refused(ended, here):
    assert (ended.code, ended.out) == (2, ""), ended.err
    assert "Traceback" not in ended.err
    assert names(here.parent / "temporary") == []
    assert names(here) == ["net.onnx", "samples.npz"]


@pytest.mark.parametrize("size", [100, 700, 1500, 3000, 6000, 12000])
def test_a_write_that_fails_leaves_nothing(here, qdeploy, size):
    with files_of_at_most(size):
        ended = qdeploy(QUANTIZE)

    check_refused(ended, here)
    assert ended.err.startswith("error: ")


def test_statistics_that_cannot_be_written_are_named(here, qdeploy):
    with files_of_at_most(3000):
        ended = qdeploy(CALIBRATE)

    check_refused(ended, here)
    assert ended.err.splitlines()[0] == "error: A file grew too large: stats.npz was not written."


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount")
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if not mounted or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named(here, small_disk, qdeploy):
    (small_disk / "ballast").write_bytes(bytes(60_000))

    ended = qdeploy(QUANTIZE, "-o", small_disk / "out")

    check_refused(ended, here)
    assert ended.err.splitlines()[0] == f"error: The disk is full: {small_disk}/out was not written."
    assert names(small_disk) == ["ballast"]


def test_no_room_for_intermediate_files_is_told(here, small_disk, qdeploy, monkeypatch):
    (small_disk / "ballast").write_bytes(bytes(64_000))
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(small_disk))
        ended = qdeploy(QUANTIZE)

    check_refused(ended, here)
    assert str(small_disk) in ended.err
    assert names(small_disk) == ["ballast"]


def test_a_folder_for_temporary_files_that_is_not_there_is_told(here, qdeploy, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(here / "gone"))
        ended = qdeploy(QUANTIZE)

    check_refused(ended, here)
    assert ended.err.startswith("error: There is no room for intermediate files: ")
    assert ended.err.endswith("\nMake some, or set TMPDIR to a folder that can be written.\n")
