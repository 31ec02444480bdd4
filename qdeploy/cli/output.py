"""Where results go: standard output, which belongs to them alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from qdeploy.report.schema import Report


@contextmanager
def results() -> Iterator[IO[str]]:
    """Standard output as a file of its own; what anyone else writes there from now on goes to standard error.

    It stays so until the process ends: C libraries keep what they print in buffers, and empty those last of all.
    """
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as file:
        os.dup2(2, 1)
        try:
            yield file
            file.flush()
        except (BrokenPipeError, SystemExit):  # rich makes the second of the first
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # what is still buffered goes nowhere
            raise


def give(report: Report, file: IO[str], *, as_json: bool, quiet: bool, ending: str = "") -> int:
    """Print a report in the form asked for, `ending` below it, and answer with the exit code."""
    from qdeploy.report.terminal import show

    if as_json:
        file.write(report.text())
    elif not quiet:
        show(report, file)
        file.write(ending)
    return report.exit_code


def printable(text: str) -> str:
    """A text from a file as one line that no control sequence can leave."""
    return "".join(character if character.isprintable() else "?" for character in text)
