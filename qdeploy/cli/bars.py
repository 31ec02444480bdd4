"""Progress in the terminal: a bar with the time that is left, or a spinner where that is not known."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qdeploy.progress import SILENT, Progress


class Bars:
    """Draws each step on standard error."""

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """A line that stays when the step is over."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        counted = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True))
        columns = counted if total is not None else (TimeElapsedColumn(),)
        name = TextColumn("{task.description}", markup=False)
        with Progress(SpinnerColumn(finished_text=" "), name, *columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(title, total=total)
            yield lambda: progress.advance(task)
            progress.update(task, total=total or 1, completed=total or 1)


def progress(*, quiet: bool) -> Progress:
    """Bars if standard error is a terminal and something may be shown; otherwise nothing."""
    return Bars() if sys.stderr.isatty() and not quiet else SILENT
