"""`qdeploy parity`: a bundle's targets against FP32, on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from qdeploy.cli import options
from qdeploy.cli.bars import progress
from qdeploy.cli.output import give, reserve_stdout


def parity(  # noqa: PLR0913 - one parameter an option
    bundle: options.BundlePath,
    evaluation: options.Evaluation = None,
    target: Annotated[str | None, typer.Option(metavar="NAME\\[:PRECISION]", help="Only this target.")] = None,
    metric: options.Metric = None,
    max_drop: options.MaxDrop = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Compare the targets of a bundle with FP32 on this machine; the bundle is not changed."""
    from qdeploy import pipeline

    file = reserve_stdout()
    report = pipeline.compare_bundle(
        bundle, evaluation=evaluation, target=target, metric=metric, max_drop=max_drop, progress=progress(quiet=quiet)
    )
    return give(report, file, as_json=as_json, quiet=quiet)
