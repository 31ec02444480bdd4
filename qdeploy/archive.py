"""Zip archives from elsewhere, .npz files among them: looked at before anything in them is unpacked."""

from __future__ import annotations

import stat
from pathlib import PurePosixPath
from zipfile import ZipFile

FREE = 64_000_000
"""Bytes that any archive may become."""

RATIO = 100
"""How many times its own size a larger one may become; zlib alone can do a thousand."""


def require_modest(archive: ZipFile, size: int) -> None:
    """Refuse an archive that would fill the memory. A member never gives more than it declares.

    Args:
        archive: Opened for reading.
        size: Bytes of its file.

    Raises:
        ValueError: It becomes far larger than any that qdeploy reads.
    """
    unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > max(FREE, RATIO * size):
        raise ValueError(f"its {size:,} bytes would become {unpacked:,}")


def require_plain_paths(archive: ZipFile) -> None:
    """Refuse an archive with members that name places outside of it.

    Raises:
        ValueError: A member has an absolute path or one with "..", or is a link.
    """
    for member in archive.infolist():
        path = PurePosixPath(member.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in member.filename:
            raise ValueError(f"its member {member.filename!r} leads out of it")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ValueError(f"its member {member.filename!r} is a link")
