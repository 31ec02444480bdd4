"""`qdeploy package`: a bundle made ready for the place where it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qdeploy.cli import options
from qdeploy.cli.output import printable
from qdeploy.errors import InputError


def package(
    bundle: options.BundlePath,
    *,
    kind: Annotated[
        Literal["edge", "triton"],
        typer.Option(
            "--for",
            help="edge: a folder with a runner script that needs onnxruntime and numpy; triton: a model repository for "
            "Triton Inference Server.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.")],
    target: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="Only this target, or this folder of the bundle.",
            default_factory=list,
            show_default=False,
        ),
    ],
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> int:
    """Make a bundle ready for the place where it runs: an edge device, or a server."""
    from qdeploy.bundle.packages.edge import package_edge
    from qdeploy.bundle.packages.triton import package_triton

    if kind == "triton":
        names = package_triton(bundle, output, targets=target, force=force)
        written = f"{output}: {', '.join(names)}"
    else:
        if len(target) > 1:
            raise InputError("An edge package holds one target.", "Give --target once.")
        package_edge(bundle, output, target=target[0] if target else None, force=force)
        written = f"{output}: run it there with python run.py"
    if not quiet:
        typer.echo(printable(written))
    return 0
