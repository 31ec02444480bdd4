"""`qdeploy parity`: a bundle's targets against FP32, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qdeploy.cli import options
from qdeploy.cli.bars import progress
from qdeploy.cli.output import give, results

if TYPE_CHECKING:
    from qdeploy.recipe import Recipe


def parity(  # noqa: PLR0913 - one parameter an option
    bundle: options.BundlePath,
    *,
    evaluation: options.Evaluation = None,
    target: Annotated[str | None, typer.Option(metavar="NAME", help="Only this target, or this folder.")] = None,
    metric: options.Metric = None,
    max_drop: options.MaxDrop = None,
    workers: options.WorkerCount = None,
    ray: options.Ray = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Compare the targets of a bundle with FP32 on this machine, on its golden samples unless others are given."""
    from qdeploy import bundled
    from qdeploy.workers import hired

    with results() as file, hired(workers, ray) as share:
        recipe = bundle_recipe(bundle, evaluation, metric, max_drop)
        report = bundled.compare_bundle(recipe, bundle, target, progress(quiet=quiet), share)
        return give(report, file, as_json=as_json, quiet=quiet)


def bundle_recipe(path: Path, evaluation: str | None, metric: str | None, max_drop: float | None) -> Recipe:
    """The comparison of a bundle as a recipe."""
    from qdeploy.bundle.load import open_bundle
    from qdeploy.model import ModelSource
    from qdeploy.recipe import Recipe, TargetRequest
    from qdeploy.samples.kinds import preprocessing_from_json

    manifest = open_bundle(path).manifest
    return Recipe(
        source=ModelSource(str(path / "float" / "model.onnx"), "onnx", manifest.inputs, manifest.dims),
        targets=tuple(TargetRequest(target.target, target.precision) for target in manifest.targets),
        states=manifest.states,
        evaluation=evaluation or str(path / "golden" / "inputs.npz"),
        preprocessing=preprocessing_from_json(manifest.preprocessing) if manifest.preprocessing else None,
        metric=metric,
        max_drop=max_drop,
    )
