"""`qdeploy export`: from a model to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qdeploy.cli import options
from qdeploy.cli.bars import progress
from qdeploy.cli.output import give, results

if TYPE_CHECKING:
    from qdeploy.report.schema import Report


def export(  # noqa: PLR0913 - one parameter an option
    source: options.Source = None,
    *,
    target: options.Targets,
    recipe: options.Recipe = None,
    calibration: options.Calibration = None,
    statistics: options.StatisticsFile = None,
    evaluation: options.Evaluation = None,
    preprocess: options.Preprocess = None,
    samples: options.Samples = None,
    workers: options.WorkerCount = None,
    ray: options.Ray = None,
    reader: options.Reader = None,
    granularity: options.Granularity = None,
    recover: options.Recover = None,
    keep: options.Keep,
    metric: options.Metric = None,
    max_drop: options.MaxDrop = None,
    inputs: options.Inputs,
    dims: options.Dims,
    state: options.States,
    setting: options.Settings,
    output: options.Output = Path("out"),
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Quantize a model for its targets, compare them with FP32, and write the bundle."""
    from qdeploy import pipeline
    from qdeploy.recipe import Given, TargetRequest, merged, read_recipe
    from qdeploy.workers import hired

    given = Given(
        source=source,
        inputs=options.specs(inputs) or None,
        dims=options.ranges(dims) or None,
        targets=tuple(map(TargetRequest.parse, target)) or None,
        options=options.settings(setting) or None,
        states=options.states(state) or None,
        calibration=calibration,
        statistics=statistics,
        evaluation=evaluation,
        preprocessing=options.preprocessing(preprocess),
        samples=samples,
        reader=reader,
        granularity=granularity,
        keep=tuple(keep) or None,
        recover=None if recover is None else tuple(recover.split(",")),
        metric=metric,
        max_drop=max_drop,
    )
    whole = merged(Given() if recipe is None else read_recipe(recipe), given)
    with results() as file, hired(workers, ray) as share:
        report = pipeline.run(whole, output, force=force, progress=progress(quiet=quiet), workers=share)
        return give(report, file, as_json=as_json, quiet=quiet, ending=_ending(report, output))


def _ending(report: Report, bundle: Path) -> str:
    """Where the bundle is, and what to do next."""
    if report.exit_code == 1:
        advice = "report.html in it tells more; --reader, --keep and --recover change how it is quantized."
    else:
        advice = f"Copy it to where it will run, and compare there: qdeploy parity {bundle.name}"
    return f"\nThe bundle is in {bundle}. {advice}\n"
