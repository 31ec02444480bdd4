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
        Literal["edge", "android", "ios", "triton", "triton-python"],
        typer.Option(
            "--for",
            help="edge: a folder with a runner script that needs onnxruntime and numpy; android: a Gradle module with "
            "the model in ORT format; ios: a Swift package with the .mlpackage; triton: a model repository for Triton "
            "Inference Server; triton-python: the same for a server that has its Python backend alone.",
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
    version: Annotated[
        int, typer.Option("--model-version", metavar="N", help="The version that Triton serves the models as.")
    ] = 1,
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> int:
    """Make a bundle ready for the place where it runs: an edge device, a phone, or a server."""
    from qdeploy.bundle.packages.triton import NATIVE, PYTHON, package_triton

    if kind in ("triton", "triton-python"):
        servings = NATIVE if kind == "triton" else PYTHON
        names = package_triton(bundle, output, servings=servings, targets=target, version=version, force=force)
        written = f"{output}: {', '.join(names)}"
    else:
        if len(target) > 1:
            raise InputError(f"A package for {kind} holds one target.", "Give --target once.")
        written = f"{output}: {_write_one(kind, bundle, output, target[0] if target else None, force=force)}"
    if not quiet:
        typer.echo(printable(written))
    return 0


def _write_one(kind: str, bundle: Path, output: Path, target: str | None, *, force: bool) -> str:
    """Write a package that holds one target; how it is run."""
    from qdeploy.bundle.packages.android import package_android
    from qdeploy.bundle.packages.edge import package_edge
    from qdeploy.bundle.packages.ios import package_ios

    write, how = {
        "edge": (package_edge, "run it there with python run.py"),
        "android": (package_android, "test it on a device with gradle connectedAndroidTest"),
        "ios": (package_ios, "test it on a Mac with swift test"),
    }[kind]
    write(bundle, output, target=target, force=force)
    return how
