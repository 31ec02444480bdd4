"""`qdeploy report`: what a bundle says of itself, and what has changed since another one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from qdeploy.cli import options
from qdeploy.cli.output import results
from qdeploy.errors import InputError

if TYPE_CHECKING:
    from qdeploy.report.contents import Contents
    from qdeploy.report.schema import Differences, Report

Limit = float | None

DEFAULTS = (0.01, 3.0, 1.1, 1.05)
"""Losses of accuracy and of SQNR, ratios of latency and of size."""


def report(  # noqa: PLR0913 - one parameter an option
    bundle: options.BundlePath,
    *,
    compare: Annotated[
        Path | None, typer.Option("--compare", metavar="BUNDLE", help="Say what has changed since this one.")
    ] = None,
    max_accuracy_loss: Annotated[
        Limit,
        typer.Option(
            metavar="X", help="With --compare: the allowed loss of the metric; 0.01 is one point.", show_default="0.01"
        ),
    ] = None,
    max_sqnr_loss: Annotated[
        Limit,
        typer.Option(
            metavar="DB", help="With --compare, and without a metric: the allowed loss of SQNR.", show_default="3"
        ),
    ] = None,
    max_slowdown: Annotated[
        Limit,
        typer.Option(metavar="X", help="With --compare: the allowed ratio of median latencies.", show_default="1.1"),
    ] = None,
    max_growth: Annotated[
        Limit, typer.Option(metavar="X", help="With --compare: the allowed ratio of sizes.", show_default="1.05")
    ] = None,
    analysis: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What qdeploy analyze sensitivity --json printed, for the page."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it as an HTML page, too.")
    ] = None,
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Show the report of a bundle, and exit as its export did; or compare two, and exit with 1 if it got worse."""
    from qdeploy.bundle.write import require_free_file, writing_file

    given = (max_accuracy_loss, max_sqnr_loss, max_slowdown, max_growth)
    if compare is None and any(limit is not None for limit in given):
        raise InputError("A limit is given, but nothing to compare with.", "Add --compare BUNDLE.")
    if analysis is not None and (output is None or compare is not None):
        raise InputError("--analysis is shown on the page of one bundle.", "Give -o FILE, and no --compare.")
    with results() as file:
        if output is not None:
            require_free_file(output, force=force)
        shown = _bundle(bundle, analysis) if compare is None else _comparison(bundle, compare, given)
        if output is not None:
            with writing_file(output, force=force) as path:
                path.write_text(shown.page(), "utf-8")
        if as_json:
            file.write(shown.document.text())
        elif not quiet:
            shown.show(file)
        return shown.document.exit_code


@dataclass(frozen=True)
class _Shown:
    """One document in its three forms."""

    document: Report | Differences
    show: Callable[[IO[str]], None]
    page: Callable[[], str]


def _bundle(path: Path, analysis: Path | None) -> _Shown:
    from qdeploy.report import page, terminal

    contents = _contents(path)
    if analysis is not None:
        contents = contents.with_sensitivity(analysis)
    return _Shown(contents.report, partial(terminal.show, contents.report), partial(page.render, contents))


def _comparison(new: Path, base: Path, given: tuple[Limit, ...]) -> _Shown:
    from qdeploy.report import comparison, comparison_page, terminal

    values = (default if limit is None else limit for limit, default in zip(given, DEFAULTS, strict=True))
    allowed = comparison.limits(*values)
    names = (new.name, base.name) if new.name != base.name else (str(new), str(base))
    found = comparison.compare(_contents(new), _contents(base), allowed, names)
    return _Shown(found, partial(terminal.show_differences, found), partial(comparison_page.render, found))


def _contents(path: Path) -> Contents:
    """What a bundle holds, its digests checked."""
    from qdeploy.bundle.load import open_bundle
    from qdeploy.report.contents import read_contents

    return read_contents(open_bundle(path).path)
