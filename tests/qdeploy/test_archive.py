"""Archives that would do harm when they are unpacked."""

import io
import stat
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from qdeploy.archive import require_modest, require_plain_paths
from qdeploy.bundle.golden import read_npz
from qdeploy.errors import InputError
from qdeploy.export import load
from qdeploy.model import ModelSource
from qdeploy.statistics import Statistics


def archive(*names, mode=0o644):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as written:
        for name in names:
            member = zipfile.ZipInfo(name)
            member.external_attr = mode << 16
            written.writestr(member, "elsewhere")
    return zipfile.ZipFile(content)


def bomb(path: Path) -> Path:
    """An .npz of a hundred kilobytes with a hundred megabytes of zeros."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (25_000_000,)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as written, written.open("header.npy", "w") as member:
        member.write(header.getvalue())
        for _ in range(100):
            member.write(bytes(1_000_000))
    return path


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../up", "..", "C:/x", "a\\..\\..\\up"])
def test_a_path_that_leads_out_is_refused(name):
    with pytest.raises(ValueError, match="leads out of it"):
        require_plain_paths(archive("fine", name))


def test_a_link_is_refused():
    with pytest.raises(ValueError, match="its member 'link' is a link"):
        require_plain_paths(archive("link", mode=stat.S_IFLNK | 0o777))


def test_plain_paths_pass():
    require_plain_paths(archive("a", "a/b.c", "..a/b..", "data/.keep"))


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = bomb(tmp_path / "bomb.npz")
    assert path.stat().st_size < 200_000
    begun = time.monotonic()

    with zipfile.ZipFile(path) as opened, pytest.raises(ValueError, match="bytes would become 100,000,128"):
        require_modest(opened, path.stat().st_size)
    with pytest.raises(InputError, match="bytes would become"):
        read_npz(path)
    with pytest.raises(InputError, match="bytes would become"):
        Statistics.load(path)
    assert time.monotonic() - begun < 1


def test_an_ordinary_archive_passes(tmp_path):
    np.savez_compressed(tmp_path / "zeros.npz", a=np.zeros(1_000_000))

    assert list(read_npz(tmp_path / "zeros.npz")) == ["a"]


def test_golden_samples_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "inputs.npz").write_bytes(b"PK")
    np.savez(tmp_path / "objects.npz", a=np.array([{}]))

    with pytest.raises(InputError, match=r"inputs\.npz cannot be read"):
        read_npz(tmp_path / "inputs.npz")
    with pytest.raises(InputError, match=r"objects\.npz cannot be read"):
        read_npz(tmp_path / "objects.npz")


@pytest.mark.parametrize("name", ["/etc/passwd", "../up"])
def test_a_program_with_paths_that_lead_out_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "net.pt2", "w") as written:
        written.writestr(name, "x")

    with pytest.raises(InputError, match="leads out of it"):
        load(ModelSource.parse(str(tmp_path / "net.pt2")))
