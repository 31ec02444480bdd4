"""`qdeploy report`: what a bundle says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qdeploy.cli import options
from qdeploy.cli.output import give, results

if TYPE_CHECKING:
    from qdeploy.bundle.load import Bundle
    from qdeploy.report.schema import Report


def report(
    bundle: options.BundlePath,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it as an HTML page, too.")
    ] = None,
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Show the report of a bundle; exits as the export that wrote it did."""
    from qdeploy.bundle.load import open_bundle
    from qdeploy.bundle.write import require_free_file
    from qdeploy.report.schema import Report

    with results() as file:
        if output is not None:
            require_free_file(output, force=force)
        opened = open_bundle(bundle)
        found = Report.read(opened.path / "report.json")
        if output is not None:
            _write_page(opened, found, output, force=force)
        return give(found, file, as_json=as_json, quiet=quiet)


def _write_page(bundle: Bundle, report: Report, output: Path, *, force: bool) -> None:
    from qdeploy.bundle.write import writing_file
    from qdeploy.report.page import render
    from qdeploy.report.schema import Layers

    folders = [target.folder for target in bundle.manifest.targets]
    layers = {folder: Layers.read(bundle.path / folder / "layers.json").layers for folder in folders}
    with writing_file(output, force=force) as path:
        path.write_text(render(report, layers), "utf-8")
