"""qdeploy by the same rules: samples from files, a process of its own, everything at its default."""

import shutil
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from task import Samples, run


def _quantize(model: Path, samples: Samples, output: Path, *, precision: str) -> None:
    import qdeploy
    from qdeploy.building import Making, build
    from qdeploy.model import ModelSource
    from qdeploy.outcome import Job
    from qdeploy.pipeline import calibration_reader, look_up
    from qdeploy.recipe import Recipe, TargetRequest
    from qdeploy.samples.source import Sample

    (job,) = look_up(Recipe(ModelSource.parse(str(model)), (TargetRequest("ort-cpu", precision),)))
    assert isinstance(job, Job)
    with TemporaryDirectory(prefix="qdeploy-") as name:
        prepared, scratch, bundle = (Path(name) / part for part in ("prepared", "scratch", "bundle"))
        for folder in (prepared, scratch, bundle):
            folder.mkdir()
        float_model = qdeploy.prepare(qdeploy.describe(model, "model", {}), prepared)
        statistics = qdeploy.collect(float_model, map(Sample, samples)) if job.calibrated else None
        making = Making(job, float_model, statistics, calibration_reader("mse"), scratch)
        shutil.copy(build(making, bundle).artifact.path, output)


if __name__ == "__main__":
    run({precision: partial(_quantize, precision=precision) for precision in ("int8", "int8-dynamic")})
