"""Outputs that appear whole or not at all: written aside, then renamed into place.

A run that is killed leaves what it had written under a hidden name beside the output, `.NAME.partial-…`, and what it
was about to replace, if anything, under the output's own name or `.NAME.replaced-…`.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qdeploy.errors import InputError

MANIFEST = "bundle.json"
"""The file that makes a folder a bundle."""

PACKAGE = "qdeploy-package.json"
"""The file that makes a folder a package, made of a bundle for the place where it runs."""

FULL = {
    errno.ENOSPC: "The disk is full",
    errno.EDQUOT: "The disk quota is used up",
    errno.EFBIG: "A file grew too large",
}
"""What the operating system says when there is no room for more."""


def require_free(output: Path, *, force: bool) -> None:
    """Check, before any work, that a folder can be written.

    Args:
        output: The folder to come; missing parents are made when it is written.
        force: It may replace an empty folder, a bundle or a package, never anything else.

    Raises:
        InputError: It exists and may not be replaced, or the folder above it is not writable.
    """
    _require_place(output, force=force)
    with _naming(output):
        if output.is_mount():
            raise InputError(f"{output} is a mount point, which cannot be replaced.", "Name a folder inside it.")
        ours = any((output / name).is_file() for name in (MANIFEST, PACKAGE))
        if output.exists() and not ours and not (output.is_dir() and not any(output.iterdir())):
            what = f"{output} is not a qdeploy bundle, so --force does not replace it."
            raise InputError(what, "Name another output, or remove it yourself.")


def require_free_file(output: Path, *, force: bool) -> None:
    """Check, before any work, that a file can be written.

    Args:
        output: The file to come; missing parents are made when it is written.
        force: It may replace a file, never a folder.

    Raises:
        InputError: It exists and may not be replaced, or the folder above it is not writable.
    """
    with _naming(output):
        if output.is_dir():
            raise InputError(f"{output} is a folder; a file is to be written there.", "Name a file.")
    _require_place(output, force=force)


@contextmanager
def writing(output: Path, *, force: bool) -> Iterator[Path]:
    """Give an empty folder to write into; it becomes `output` when the block ends well, and vanishes otherwise.

    Raises:
        InputError: As `require_free`, or the disk is full.
    """
    require_free(output, force=force)
    with _folder_beside(output) as partial:
        yield partial
        require_free(output, force=force)
        with _naming(output):
            _replace(output.resolve(), partial)


@contextmanager
def writing_file(output: Path, *, force: bool) -> Iterator[Path]:
    """Give a path to write a file at; it becomes `output` when the block ends well, and vanishes otherwise.

    Raises:
        InputError: As `require_free_file`, or the disk is full.
    """
    require_free_file(output, force=force)
    with _folder_beside(output) as partial:
        yield partial / output.name
        require_free_file(output, force=force)
        with _naming(output):
            (partial / output.name).replace(output.resolve())


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give an empty folder for intermediate files, gone in the end.

    Raises:
        InputError: The folder for temporary files cannot be written.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="qdeploy-"))
    except OSError as error:
        what = f"There is no room for intermediate files: {error}."
        raise InputError(what, "Make some, or set TMPDIR to a folder that can be written.") from error
    try:
        yield folder
    finally:
        _remove(folder)


def _require_place(output: Path, *, force: bool) -> None:
    with _naming(output):
        if output.exists() and not force:
            raise InputError(f"{output} exists already.", "Name another output, or replace it with --force.")
        nearest = next(parent for parent in (*output.resolve().parents, Path("/")) if parent.exists())
        if not nearest.is_dir():
            raise InputError(f"{output} cannot be written: {nearest} is not a folder.", "Name another output.")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise InputError(f"{output} cannot be written: {nearest} is not writable.", "Name another output.")


@contextmanager
def _naming(output: Path) -> Iterator[None]:
    """Say which output it was that the operating system refused."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}.", "Name another output.") from error


@contextmanager
def _folder_beside(output: Path) -> Iterator[Path]:
    """An empty hidden folder beside the output, gone in the end."""
    partial = _hidden(output.resolve(), "partial")
    try:
        with _naming(output):
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
        yield partial
    except OSError as error:
        if error.errno in FULL:
            what = f"{FULL[error.errno]}: {output} was not written."
            cure = f"Make room there, or in {tempfile.gettempdir()}, where intermediate files lie."
            raise InputError(what, cure) from error
        raise
    finally:
        _remove(partial)


def _hidden(path: Path, why: str) -> Path:
    return path.with_name(f".{path.name}.{why}-{secrets.token_hex(4)}")


def _replace(target: Path, partial: Path) -> None:
    """Rename a finished folder into place; what was there goes only after that."""
    if not target.exists():
        partial.rename(target)
        return
    replaced = _hidden(target, "replaced")
    try:
        target.rename(replaced)
        partial.rename(target)
    finally:
        if target.exists():
            _remove(replaced)
        else:
            replaced.rename(target)


def _remove(folder: Path) -> None:
    """Remove a folder; what cannot be removed is no reason to fail, and an interrupt no reason to stop half-way."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
