import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from qdeploy.bundle.write import require_free, require_free_file, scratch_folder, writing, writing_file
from qdeploy.errors import InputError

KILLED = """
import sys, time
from pathlib import Path
from qdeploy.bundle import write

def stop():
    print("now", flush=True)
    time.sleep(60)

{patch}
with write.writing(Path(sys.argv[1]), force=True) as folder:
    (folder / "half").write_text("half")
    {body}
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def bundle_at(path):
    path.mkdir()
    (path / "bundle.json").write_text("old")
    return path


def killed(output, *, patch="", body=""):
    """Run a writer in a process of its own and kill it where it prints."""
    script = KILLED.format(patch=patch, body=body)
    with subprocess.Popen([sys.executable, "-c", script, output], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGKILL)


def test_a_folder_appears_when_the_block_ends(tmp_path):
    output = tmp_path / "new" / "out"
    with writing(output, force=False) as folder:
        (folder / "file").write_text("x")
        assert not output.exists()

    assert (output / "file").read_text() == "x"
    assert names(tmp_path / "new") == ["out"]
    assert output.stat().st_mode == output.parent.stat().st_mode


def test_a_file_appears_when_the_block_ends(tmp_path):
    output = tmp_path / "stats.npz"
    with writing_file(output, force=False) as path:
        assert path.suffix == ".npz"
        path.write_text("x")
        assert not output.exists()

    assert output.read_text() == "x"
    assert names(tmp_path) == ["stats.npz"]


def failing(writer, output, error, *, force=False):
    """Write something, then fail."""
    with writer(output, force=force) as path:
        (path / "part" if path.is_dir() else path).write_text("x")
        raise error


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3), PermissionError(13, "x", "y")])
@pytest.mark.parametrize("writer", [writing, writing_file])
def test_nothing_is_left_of_a_block_that_fails(tmp_path, writer, error):
    with pytest.raises(type(error)):
        failing(writer, tmp_path / "out", error)

    assert names(tmp_path) == []


def test_a_failing_block_leaves_the_old_bundle(tmp_path):
    output = bundle_at(tmp_path / "out")
    with pytest.raises(ValueError, match="x"):
        failing(writing, output, ValueError("x"), force=True)

    assert names(tmp_path) == ["out"]
    assert names(output) == ["bundle.json"]


def test_force_replaces_a_bundle_whole(tmp_path):
    output = bundle_at(tmp_path / "out")
    with writing(output, force=True) as folder:
        (folder / "new").touch()

    assert names(output) == ["new"]
    assert names(tmp_path) == ["out"]


def test_force_replaces_an_empty_folder(tmp_path):
    (tmp_path / "out").mkdir()
    with writing(tmp_path / "out", force=True) as folder:
        (folder / "new").touch()

    assert names(tmp_path / "out") == ["new"]


def test_force_replaces_what_a_link_points_to(tmp_path):
    bundle_at(tmp_path / "run1")
    (tmp_path / "latest").symlink_to("run1")
    with writing(tmp_path / "latest", force=True) as folder:
        (folder / "new").touch()

    assert (tmp_path / "latest").is_symlink()
    assert names(tmp_path / "run1") == ["new"]


@pytest.mark.parametrize("check", [require_free, require_free_file])
def test_nothing_is_overwritten_without_force(tmp_path, check):
    output = tmp_path / "out"
    output.write_text("x")
    with pytest.raises(InputError) as caught:
        check(output, force=False)

    assert str(caught.value) == f"{output} exists already. Name another output, or replace it with --force."


def test_force_does_not_replace_what_is_no_bundle(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    for output in (tmp_path / "home", tmp_path / "home" / "thesis.tex"):
        with pytest.raises(InputError, match="is not a qdeploy bundle, so --force does not replace it"):
            require_free(output, force=True)


def test_a_mount_point_is_refused_before_the_work():
    with pytest.raises(InputError, match="is a mount point, which cannot be replaced"):
        require_free(Path("/"), force=True)


def test_a_file_never_replaces_a_folder(tmp_path):
    with pytest.raises(InputError, match="is a folder; a file is to be written there"):
        require_free_file(tmp_path, force=True)


@pytest.mark.parametrize("check", [require_free, require_free_file])
def test_a_place_that_cannot_hold_the_output_is_refused(tmp_path, check):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is not a folder"):
        check(tmp_path / "file" / "sub" / "out", force=False)
    with pytest.raises(InputError, match="cannot be written: File name too long"):
        check(tmp_path / ("x" * 300), force=False)


def test_a_folder_that_is_not_writable_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, _mode: path != tmp_path)
    with pytest.raises(InputError) as caught:
        require_free(tmp_path / "a" / "b", force=False)

    assert str(caught.value) == f"{tmp_path}/a/b cannot be written: {tmp_path} is not writable. Name another output."


@pytest.mark.parametrize("writer", [writing, writing_file])
def test_a_refusal_of_the_operating_system_names_the_output(writer):
    with pytest.raises(InputError, match="/proc/out cannot be written"), writer(Path("/proc/out"), force=False):
        pass


@pytest.mark.parametrize("writer", [writing, writing_file])
def test_a_full_disk_is_said_to_be_one(tmp_path, writer):
    with pytest.raises(InputError) as caught:
        failing(writer, tmp_path / "out", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    cure = f"Make room there, or in {tempfile.gettempdir()}, where intermediate files lie."
    assert str(caught.value) == f"The disk is full: {tmp_path}/out was not written. {cure}"
    assert names(tmp_path) == []


def test_an_interrupt_while_the_old_bundle_is_removed_leaves_nothing_of_it(tmp_path, monkeypatch):
    bundle_at(tmp_path / "out")
    rmtree, calls = shutil.rmtree, []

    def interrupted_once(path, **options):
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted_once)
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "out", force=True) as folder:
        (folder / "new").touch()

    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["new"]


def test_intermediate_files_are_gone_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder() as folder:
        (folder / "half").touch()

    assert folder.parent == tmp_path
    assert names(tmp_path) == []


@pytest.mark.parametrize("writer", [writing, writing_file])
def test_what_appeared_meanwhile_is_not_overwritten(tmp_path, writer):
    with pytest.raises(InputError, match="exists already"), writer(tmp_path / "out", force=False):
        (tmp_path / "out").write_text("someone else's")

    assert (tmp_path / "out").read_text() == "someone else's"


def test_a_failing_rename_brings_the_old_bundle_back(tmp_path, monkeypatch):
    output = bundle_at(tmp_path / "out")
    rename = Path.rename

    def fail(path, to):
        if ".partial-" in path.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(InputError, match="Input/output error"), writing(output, force=True):
        pass

    assert names(tmp_path) == ["out"]
    assert names(output) == ["bundle.json"]


def test_a_killed_writer_leaves_no_output(tmp_path):
    output = tmp_path / "out"
    killed(output, body="stop()")

    assert not output.exists()
    assert all(name.startswith(".out.partial-") for name in names(tmp_path))
    with writing(output, force=False):
        pass
    assert output.exists()


def test_a_writer_killed_between_two_renames_leaves_the_old_and_the_new(tmp_path):
    output = bundle_at(tmp_path / "out")
    patch = """
rename = Path.rename
def pausing(path, to):
    if ".partial-" in path.name:
        stop()
    return rename(path, to)
Path.rename = pausing
"""
    killed(output, patch=patch)

    partial, replaced = names(tmp_path)
    assert partial.startswith(".out.partial-")
    assert replaced.startswith(".out.replaced-")
    assert (tmp_path / partial / "half").read_text() == "half"
    assert (tmp_path / replaced / "bundle.json").read_text() == "old"
