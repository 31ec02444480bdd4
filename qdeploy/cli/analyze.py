"""`qdeploy analyze`: what quantization does to a model's weights, and to each of its layers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qdeploy.cli import options
from qdeploy.cli.bars import progress
from qdeploy.cli.output import results
from qdeploy.errors import InputError

if TYPE_CHECKING:
    from qdeploy.analysis.layers import LayerErrors
    from qdeploy.analysis.sensitivity import Sensitivity
    from qdeploy.analysis.weights import WeightReport
    from qdeploy.progress import Progress
    from qdeploy.recipe import Recipe
    from qdeploy.workers import Workers

    Found = tuple[WeightReport, ...] | Sensitivity | LayerErrors

What = Annotated[
    Literal["weights", "sensitivity", "layers"],
    typer.Argument(
        metavar="weights|sensitivity|layers",
        help="weights: channel ranges and outliers; sensitivity: what each layer alone costs the output; layers: each "
        "layer's error, and why.",
        show_default=False,
    ),
]
Bits = Annotated[
    str,
    typer.Option("--bits", metavar="N,...", help="Widths for sensitivity; 16 is float16 unless the target has int16."),
]


def analyze(  # noqa: PLR0913 - one parameter an option
    what: What,
    source: options.Source = None,
    *,
    target: Annotated[
        str | None,
        typer.Option(metavar="NAME[:PRECISION]", help="Whose rules to analyze.", show_default="ort-cpu"),
    ] = None,
    recipe: options.Recipe = None,
    calibration: options.Calibration = None,
    statistics: Annotated[
        Path | None,
        typer.Option("--statistics", metavar="STATS", help="What qdeploy calibrate wrote, to save calibrating anew."),
    ] = None,
    bits: Bits = "4,8,16",
    workers: options.WorkerCount = None,
    ray: options.Ray = None,
    preprocess: options.Preprocess = None,
    samples: options.Samples = None,
    reader: options.Reader = None,
    granularity: options.Granularity = None,
    recover: options.Recover = None,
    keep: options.Keep,
    metric: options.Metric = None,
    inputs: options.Inputs,
    dims: options.Dims,
    state: options.States,
    setting: options.Settings,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Show where a model loses accuracy to quantization, why, and which option mends it."""
    from qdeploy.recipe import Given, TargetRequest, merged, read_recipe
    from qdeploy.recommend import with_chosen_targets
    from qdeploy.workers import hired

    given = Given(
        source=source,
        inputs=options.specs(inputs) or None,
        dims=options.ranges(dims) or None,
        targets=None if target is None else (TargetRequest.parse(target),),
        options=options.settings(setting) or None,
        states=options.states(state) or None,
        calibration=calibration,
        preprocessing=options.preprocessing(preprocess),
        samples=samples,
        reader=reader,
        granularity=granularity,
        keep=tuple(keep) or None,
        recover=None if recover is None else tuple(recover.split(",")),
        metric=metric,
    )
    file_given = Given() if recipe is None else read_recipe(recipe)
    if file_given.targets is None and given.targets is None:
        given = replace(given, targets=(TargetRequest("ort-cpu"),))
    whole, _ = with_chosen_targets(merged(replace(file_given, statistics=None), given))
    if what != "sensitivity" and (workers, ray) != (None, None):
        raise InputError(f"--workers and --ray are not for {what}.", "Leave them out; sensitivity takes them.")
    with results() as file:
        with hired(workers, ray) as share:
            found = _found(what, whole, statistics or file_given.statistics, bits, progress(quiet=quiet), share)
        if as_json:
            named = {"schema": 1, "analysis": what, "model": whole.source.name, "target": _target(whole)}
            file.write(json.dumps(_finite(named | _plain(found)), indent=2, ensure_ascii=False) + "\n")
        elif not quiet:
            from qdeploy.report.analysis import show

            show(f"{whole.source.name} for {_target(whole)}", found, file)
    return 0


def _found(
    what: str, recipe: Recipe, statistics: Path | None, bits: str, bars: Progress, workers: Workers | None
) -> Found:
    from qdeploy.analyze import analyze_layers, analyze_sensitivity, analyze_weights

    if what == "weights":
        return analyze_weights(recipe, progress=bars)
    if what == "layers":
        return analyze_layers(recipe, statistics, progress=bars)
    return analyze_sensitivity(recipe, statistics, bits=_widths(bits), progress=bars, workers=workers)


def _widths(text: str) -> list[int]:
    """What --bits says.

    Raises:
        InputError: It says something other than numbers.
    """
    try:
        return [int(each) for each in text.split(",")]
    except ValueError as error:
        raise InputError(f"--bits cannot be {text!r}.", "Write widths with commas between, as in 4,8,16.") from error


def _target(recipe: Recipe) -> str:
    request = recipe.targets[0]
    return f"{request.name}:{request.precision}" if request.precision else request.name


def _plain(found: Found) -> dict[str, Any]:
    return {"weights": [asdict(each) for each in found]} if isinstance(found, tuple) else asdict(found)


def _finite(value: Any) -> Any:
    """The same data as JSON can hold them: a figure that is not finite is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
