"""The commands together, and what typer makes of a command line that none of them takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

from qdeploy.cli import tell
from qdeploy.cli.analyze import analyze
from qdeploy.cli.backends import backends
from qdeploy.cli.bench import bench
from qdeploy.cli.calibrate import calibrate
from qdeploy.cli.export import export
from qdeploy.cli.inspect import inspect
from qdeploy.cli.package import package
from qdeploy.cli.parity import parity
from qdeploy.cli.quantize import quantize
from qdeploy.cli.report import report
from qdeploy.cli.verify import verify

COMMANDS = (export, quantize, calibrate, analyze, inspect, parity, bench, report, package, verify, backends)


def run(arguments: Sequence[str]) -> int:
    """Run the command that the arguments name; its exit code."""
    command = get_command(_app())
    try:
        # Not command(arguments), which has an answer of its own to interrupts and broken pipes.
        with command.make_context("qdeploy", list(arguments) or ["--help"]) as context:
            code: int = command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    except typer.TyperException as error:
        where = getattr(error, "ctx", None)
        tell(error.format_message(), f"See {where.command_path if where else 'qdeploy'} --help.")
        return 2
    return code


def _app() -> typer.Typer:
    app = typer.Typer(name="qdeploy", add_completion=False, rich_markup_mode="rich")
    app.callback()(_qdeploy)
    for command in COMMANDS:
        app.command()(command)
    return app


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it with the option's value
    if wanted:
        from importlib.metadata import version

        typer.echo(f"qdeploy {version('qdeploy')}")
        raise typer.Exit


def _qdeploy(
    *,
    version: Annotated[
        bool, typer.Option("--version", metavar="", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """From a trained PyTorch model, or an ONNX file, to a verified quantized model for the machine it will run on."""
