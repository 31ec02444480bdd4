"""What every package has: the bundle's targets that it holds, a place outside the bundle, and a note of its origin."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qdeploy.bundle.load import Bundle
from qdeploy.bundle.write import MANIFEST, PACKAGE, writing
from qdeploy.errors import InputError
from qdeploy.model import digest_of_files
from qdeploy.registry import suggestion

if TYPE_CHECKING:
    from qdeploy.bundle.manifest import BundledTarget


def targets_named(bundle: Bundle, names: Sequence[str]) -> list[BundledTarget]:
    """The targets of a bundle with these folders or of these backends; without any name, all.

    Raises:
        InputError: The bundle has no such target, or none at all.
    """
    targets = bundle.manifest.targets
    if not targets:
        raise InputError(f"The bundle {bundle.path} has no targets.", "Export for one that this machine can build.")
    for name in names:
        if not any(name in (each.folder, each.target) for each in targets):
            known = [each.folder for each in targets]
            raise InputError(f"The bundle {bundle.path} has no target {name!r}.", suggestion(name, known))
    return [each for each in targets if not names or {each.folder, each.target} & set(names)]


def chosen(bundle: Bundle, names: Sequence[str], takes: Sequence[str], what: str) -> list[BundledTarget]:
    """The targets of a bundle that go into a package.

    Args:
        bundle: The bundle.
        names: Folders or backends asked for; without any, all that fit.
        takes: Backends whose artifacts the place runs.
        what: The place, for messages.

    Raises:
        InputError: The bundle has no such target, or the place cannot run it.
    """
    asked = targets_named(bundle, names)
    fitting = [each for each in asked if each.target in takes]
    if not fitting or (names and len(fitting) < len(asked)):
        wrong = ", ".join(each.folder for each in asked if each.target not in takes)
        raise InputError(
            f"{what} cannot run {wrong} of the bundle {bundle.path}.",
            f"It runs {', '.join(takes)}: export for one of them, or choose it with --target.",
        )
    return fitting


@contextmanager
def writing_package(
    bundle: Bundle, kind: str, targets: Sequence[BundledTarget], output: Path, *, force: bool
) -> Iterator[Path]:
    """Give an empty folder to write a package into; it becomes `output` when the block ends well.

    Raises:
        InputError: It lies in the bundle, or cannot be written.
    """
    if output.resolve().is_relative_to(bundle.path.resolve()):
        raise InputError(f"{output} lies in the bundle {bundle.path}, which stays as it is.", "Name another output.")
    with writing(output, force=force) as folder:
        yield folder
        origin = {
            "schema": 1,
            "for": kind,
            "qdeploy": bundle.manifest.qdeploy,
            "bundle": digest_of_files((bundle.path / MANIFEST,)),
            "model": bundle.manifest.source,
            "targets": [f"{each.target}:{each.precision}" for each in targets],
        }
        (folder / PACKAGE).write_text(json.dumps(origin, indent=2) + "\n", "utf-8")
        sums = [f"{digest_of_files((path,))}  {path.relative_to(folder).as_posix()}\n" for path in _files(folder)]
        (folder / SUMS).write_text("".join(sums), "utf-8")


SUMS = "SHA256SUMS"
"""The digest of each other file, as `sha256sum -c` reads them."""


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
