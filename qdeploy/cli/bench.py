"""`qdeploy bench`: latency on this machine."""

from __future__ import annotations

from qdeploy.cli import options
from qdeploy.cli.bars import progress
from qdeploy.cli.output import give, reserve_stdout


def bench(path: options.ModelOrBundle, as_json: options.Json = False, quiet: options.Quiet = False) -> int:
    """Measure how fast a model, or each target of a bundle, runs on this machine."""
    from qdeploy import pipeline

    file = reserve_stdout()
    report = pipeline.bench(path, progress=progress(quiet=quiet))
    return give(report, file, as_json=as_json, quiet=quiet)
