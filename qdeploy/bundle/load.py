"""Opening a bundle: nothing in it is used before every byte of it has been checked."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qdeploy.bundle.write import MANIFEST
from qdeploy.errors import InputError
from qdeploy.model import digest_of_files

if TYPE_CHECKING:
    from qdeploy.bundle.manifest import Manifest

SHOWN = 10
"""How many problems a message names one by one."""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every file has been checked.

    Attributes:
        path: Its folder.
        manifest: What it holds.
    """

    path: Path
    manifest: Manifest


def open_bundle(path: Path) -> Bundle:
    """Check every file of a bundle against its manifest.

    Raises:
        InputError: It is no bundle, or a file was changed, is missing, is not listed, or is a link; each is named.
    """
    from qdeploy.bundle.manifest import entries, read_manifest

    main = path / MANIFEST
    try:
        if main.is_symlink() or not main.is_file():
            cure = "Name the folder that qdeploy export wrote with -o."
            raise InputError(f"{path} is not a qdeploy bundle: it holds no file {MANIFEST}.", cure)
        manifest = read_manifest(main)
        problems = list(_problems(path, dict(entries(path)), {**manifest.files, MANIFEST: ""}))
    except OSError as error:
        raise InputError(f"The bundle {path} cannot be read: {error}.") from error
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        what = f"The bundle {path} is not as it was made: {'; '.join(problems[:SHOWN])}{more}."
        raise InputError(what, "Copy or export it anew; files of your own belong elsewhere.")
    return Bundle(path, manifest)


def _problems(folder: Path, found: Mapping[str, int], listed: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with a bundle's files; an empty digest stands for a file that has been checked already."""
    for name in sorted({*found, *listed}):
        if name not in found:
            yield f"{name} is missing"
        elif stat.S_ISLNK(found[name]):
            yield f"{name} is a symbolic link"
        elif name not in listed:
            yield f"{name} is not listed in the manifest"
        elif not stat.S_ISREG(found[name]):
            yield f"{name} is not a regular file"
        elif listed[name] and digest_of_files((folder / name,)) != listed[name]:
            yield f"{name} was changed"
