"""The report in a terminal: a table of the targets, then what it has no room for."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qdeploy.report import wording
from qdeploy.report.comparison import difference_lines, figure_cells, verdict

if TYPE_CHECKING:
    from qdeploy.report.schema import Differences, Report

WIDTH = 100
"""Columns of the output when it goes to a file or a pipe."""

COLOURS = {"pass": "green", "fail": "bold red", "unavailable": "yellow"}


def show(report: Report, file: IO[str]) -> None:
    """Print a report; colours only on a terminal, and only for the status."""
    console = Console(file=file, highlight=False, width=None if file.isatty() else WIDTH)
    console.print(plain(f"{report.model.name}: {wording.verdict(report)}"))
    console.print()
    console.print(_table(report))
    console.print()
    for line in _lines(report):
        console.print(plain(line))


def show_differences(found: Differences, file: IO[str]) -> None:
    """Print two bundles side by side: a table, then what is worse than allowed."""
    console = Console(file=file, highlight=False, width=None if file.isatty() else WIDTH)
    console.print(plain(f"{found.model}, {found.new} against {found.base}: {verdict(found)}"))
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in ("Target", "", found.base, found.new, "Change", "95 % interval", ""):
        table.add_column(plain(title), justify="left" if title == "Target" else "right")
    for target in found.targets:
        for index, figure in enumerate(target.figures):
            standing = plain(f"{figure.standing}{'!' if figure.beyond else ''}")
            standing.stylize(COLOURS["fail"] if figure.beyond else "")
            texts = (target.name if index == 0 else "", *figure_cells(figure))
            table.add_row(*map(plain, texts), standing)
    console.print()
    console.print(table)
    console.print()
    for line in difference_lines(found):
        console.print(plain(line))


def _table(report: Report) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in wording.columns(report.reference.metric):
        table.add_column(plain(title), justify="left" if title in ("Target", "Status") else "right")
    table.add_row(*map(_cell, wording.reference_cells(report)))
    for row in report.targets:
        table.add_row(*map(_cell, wording.target_cells(row)))
    return table


def _cell(cell: wording.Cell) -> Text:
    text = plain(cell.main)
    text.stylize(COLOURS.get(cell.main, ""))
    return text.append("\n").append_text(plain(cell.below)) if cell.below else text


def _lines(report: Report) -> list[str]:
    lines = [wording.eager_sentence(report.reference.eager)] if report.reference.eager else []
    for row in report.targets:
        name = f"{row.target}:{row.precision}"
        lines += [f"{name}: {row.reason}"] if row.reason else []
        lines += [f"{name}: warning: {warning}" for warning in row.warnings]
    return lines + [f"note: {note}" for note in report.notes]


def plain(content: str) -> Text:
    """Plain text: no markup is read from it, and no control sequence reaches the terminal."""
    return Text("".join(c if c.isprintable() or c == "\n" else "?" for c in content))
