"""`qdeploy calibrate`: the statistics of a model's tensors, to read ranges from later."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qdeploy.cli import options
from qdeploy.cli.bars import progress
from qdeploy.errors import InputError


def calibrate(  # noqa: PLR0913 - one parameter an option
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE | STATS...", help="The model; with --merge, files to merge.", show_default=False
        ),
    ],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="STATS", help="The file to write.")],
    calibration: options.Calibration = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge statistics of one model, each of other samples.")
    ] = False,
    preprocess: options.Preprocess = None,
    samples: options.Samples = None,
    workers: options.WorkerCount = None,
    ray: options.Ray = None,
    inputs: options.Inputs,
    dims: options.Dims,
    state: options.States,
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> int:
    """Run samples through a model once, and keep the statistics from which every target's ranges are read."""
    from qdeploy import pipeline
    from qdeploy.recipe import Recipe
    from qdeploy.workers import hired

    if merge:
        found = pipeline.merge_statistics([Path(text) for text in source], output, force=force)
    elif calibration is None or len(source) != 1:
        what = "There is no calibration data." if calibration is None else f"There are {len(source)} models."
        raise InputError(what, "Write qdeploy calibrate SOURCE --calibration DATA -o STATS.")
    else:
        recipe = Recipe(
            source=options.model_source(source[0], inputs, dims),
            targets=(),
            states=options.states(state),
            calibration=calibration,
            preprocessing=options.preprocessing(preprocess),
            samples=samples,
        )
        with hired(workers, ray) as share:
            found = pipeline.calibrate(recipe, output, force=force, progress=progress(quiet=quiet), workers=share)
    if not quiet:
        for note in found.notes:
            typer.echo(f"note: {note}")
        typer.echo(f"{output}: {len(found.tensors)} tensors, {found.samples} samples.")
        typer.echo(f"To use it: qdeploy export SOURCE --target NAME --statistics {output}")
    return 0
