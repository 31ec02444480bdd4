"""What a run found out, and how it is written down: golden samples, layers, report, manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.analysis.sensitivity import LayerSensitivity
from qdeploy.backend import Artifact, Backend, Evidence
from qdeploy.bundle.golden import GoldenSample, write_golden
from qdeploy.export import EagerRunner, LoadedModel
from qdeploy.ladder import Climb
from qdeploy.model import FloatModel, QuantizedModel, copy_model, model_files, size_of_files
from qdeploy.parity import harness
from qdeploy.parity.compare import Comparison
from qdeploy.parity.latency import Latency
from qdeploy.parity.metrics import Metric
from qdeploy.parity.verdict import Stray, budget_warning, judge
from qdeploy.recipe import Recipe, TargetRequest
from qdeploy.recover.recovery import Recovery
from qdeploy.report.environment import environment, package_version
from qdeploy.samples.source import Sample, SampleSource
from qdeploy.samples.states import States, completed
from qdeploy.scheme import Form, QuantContract
from qdeploy.session import SessionRunner
from qdeploy.statistics import Statistics

if TYPE_CHECKING:
    from qdeploy.bundle.manifest import Manifest
    from qdeploy.report import schema
    from qdeploy.report.schema import ParetoPoint, Reference, Report, Step, Target, TensorRange


CALIBRATED_FORMS = (Form.QDQ, Form.QDQ_FLOAT16)
INTEGER_FORMS = (*CALIBRATED_FORMS, Form.DYNAMIC, Form.WEIGHTS, Form.WEIGHT_QDQ)

LAYERS = "layers.json"
"""What each node became: beside an artifact's files, and none of them."""


@dataclass(frozen=True)
class Job:
    """One target of a recipe, looked up and checked.

    Attributes:
        backend: The plug-in.
        precision: One that it takes.
        options: Its own options value.
        contract: The rules to quantize by.
        steps: Recovery steps to take.
        folder: In the bundle.
    """

    backend: Backend
    precision: str
    options: Any
    contract: QuantContract
    steps: tuple[str, ...]
    folder: str

    @property
    def calibrated(self) -> bool:
        """Whether its ranges come from calibration samples."""
        return self.contract.form in CALIBRATED_FORMS

    @property
    def sampled(self) -> bool:
        """Whether it looks at calibration samples, for its ranges or for its weights."""
        return self.calibrated or bool(self.steps)


@dataclass(frozen=True)
class Unavailable:
    """A target that cannot be built on this machine: why, and what to do."""

    request: TargetRequest
    reason: str


@dataclass(frozen=True)
class Built:
    """A target that was built, and its FP32 baseline on the same runtime, if that is at hand."""

    job: Job
    artifact: Artifact
    baseline: Artifact | None
    quantized: QuantizedModel | None
    violations: tuple[str, ...]
    found: Climb[Recovery] | None = None
    """The plan that it was quantized by and what the ladder tried, if it was calibrated."""
    ranges: tuple[TensorRange, ...] = ()
    """Of its activations, if it was calibrated."""

    def subject(self) -> harness.Subject:
        """What the measurements need of it."""
        backend, options = self.job.backend, self.job.options
        runner = backend.open(self.artifact, options)
        baseline = backend.open(self.baseline, options) if self.baseline else None
        # The steps of a static grid are the measure; other forms have none.
        qdq = self.quantized.path if self.quantized and self.job.calibrated else None
        return harness.Subject(self.job.folder, runner, baseline, qdq)


@dataclass(frozen=True)
class Remaining:
    """What a target loses beyond its budget.

    Attributes:
        gap: By how much the drop exceeds the budget.
        layers: Those first that lose most of the output when they alone are quantized; empty where no calibration
            sample is at hand to tell.
    """

    gap: float
    layers: tuple[LayerSensitivity, ...]


@dataclass(frozen=True)
class Measured:
    """What was measured of a built target."""

    built: Built
    evidence: Evidence
    comparison: Comparison
    stray: Stray | None
    times: tuple[Latency, Latency] | None
    remaining: Remaining | None = None


@dataclass(frozen=True)
class Samples:
    """The samples of a run, checked against the model as they stream by.

    Attributes:
        calibration: None if nothing needs to be calibrated.
        evaluation: To measure with, as the user gave them: states may be missing.
        remark: What the reader of the report must know of the evaluation samples; may be empty.
        states: What the model carries from sample to sample.
        open_evaluation: Opens the evaluation samples in another process; None where only this one can.
    """

    calibration: SampleSource | None
    evaluation: SampleSource
    remark: str
    states: States
    open_evaluation: Callable[[], SampleSource] | None = None

    def complete(self, model: FloatModel) -> SampleSource:
        """The evaluation samples with every state, as FP32 makes them: each can be run by itself."""
        return completed(self.evaluation, self.states, partial(harness.as_written, model.path))


@dataclass(frozen=True)
class Outcome:
    """All that one run did and measured; `notes` are the report's, of how its targets were chosen."""

    recipe: Recipe
    loaded: LoadedModel
    model: FloatModel
    statistics: Statistics | None
    samples: Samples
    metric: Metric | None
    lookups: list[Job | Unavailable]
    measured: list[Measured]
    notes: tuple[str, ...] = ()

    @cached_property
    def complete(self) -> SampleSource:
        """The evaluation samples with every state, as FP32 makes them."""
        return self.samples.complete(self.model)

    @cached_property
    def first(self) -> Sample:
        """The first evaluation sample, on which latency is measured."""
        return next(iter(self.complete))


def write_bundle(outcome: Outcome, bundle: Path) -> Report:
    """Write everything of a bundle but the artifacts, which are there already, and seal it."""
    from qdeploy.bundle.bom import write_bom
    from qdeploy.bundle.manifest import seal
    from qdeploy.report.contents import read_contents
    from qdeploy.report.page import render
    from qdeploy.report.schema import Layers, Ranges

    float_folder = bundle / "float"
    float_folder.mkdir()
    copy_model(outcome.model.path, float_folder)
    if outcome.statistics is not None:
        (bundle / "calibration").mkdir()
        outcome.statistics.save(bundle / "calibration" / "statistics.npz")
    write_golden(bundle, _golden_samples(outcome))
    report = make_report(outcome)
    for built in (each.built for each in outcome.measured):
        (bundle / built.job.folder / LAYERS).write_text(Layers(layers=built.artifact.layers).text(), "utf-8")
        if built.ranges:
            path = bundle / "calibration" / f"{built.job.folder}.json"
            path.write_text(Ranges(tensors=built.ranges).text(), "utf-8")
    (bundle / "recipe.toml").write_text(outcome.recipe.as_toml(bundle), "utf-8")
    (bundle / "report.json").write_text(report.text(), "utf-8")
    (bundle / "report.html").write_text(render(read_contents(bundle)), "utf-8")
    manifest = _manifest(outcome)
    write_bom(bundle, outcome.model.name, manifest)
    seal(bundle, manifest)
    return report


def _golden_samples(outcome: Outcome) -> Iterator[GoldenSample]:
    subjects = [each.built.subject() for each in outcome.measured]
    with harness.side_by_side(outcome.model.path, subjects) as run_all:
        for sample in outcome.complete:
            yield GoldenSample(sample.inputs, run_all(sample.inputs), sample.raw)


def make_report(outcome: Outcome) -> Report:
    """The report of a run."""
    from qdeploy.report import schema

    model = outcome.model
    notes = (*outcome.notes, *outcome.loaded.notes, *(outcome.statistics.notes if outcome.statistics else ()))
    rows = iter([_row(outcome, each) for each in outcome.measured])
    return schema.Report(
        qdeploy=package_version("qdeploy"),
        model=schema.Model(name=model.name, digest=model.digest, parameters=model.parameters),
        reference=_reference(outcome),
        targets=tuple(next(rows) if isinstance(each, Job) else _missing_row(each) for each in outcome.lookups),
        max_drop=outcome.recipe.max_drop,
        environment=environment(),
        notes=notes,
    )


def _missing_row(missing: Unavailable) -> Target:
    from qdeploy.report import schema

    precision = missing.request.precision or "default"
    name = missing.request.name
    return schema.Target(target=name, precision=precision, status="unavailable", reason=missing.reason)


def _reference(outcome: Outcome) -> Reference:
    from qdeploy.report import rows, schema

    model, metric = outcome.model, None
    comparison = outcome.measured[0].comparison if outcome.measured else None
    if outcome.metric is not None and comparison is not None and comparison.reference_metric is not None:
        value = round(comparison.reference_metric, rows.DECIMALS)
        metric = schema.Metric(name=outcome.metric.name, value=value, samples=comparison.samples)
    eager = None
    if outcome.loaded.module is not None:
        runner = EagerRunner(outcome.loaded)
        eager = rows.eager_row(harness.against_eager(model.path, runner, outcome.complete))
    latency = None
    if any(each.times is not None for each in outcome.measured):
        runners = {harness.FLOAT: SessionRunner(model.path)}
        times = harness.latencies(runners, outcome.first.inputs)[harness.FLOAT]
        latency = rows.latency_row(times, 0, _batch(outcome))
    return schema.Reference(
        size_bytes=size_of_files(model_files(model.path)),
        metric=metric,
        latency_ms=latency,
        eager=eager,
    )


def _batch(outcome: Outcome) -> int:
    first = next(iter(outcome.first.inputs.values()))
    return int(first.shape[0]) if first.ndim else 1


def _row(outcome: Outcome, measured: Measured) -> Target:
    from qdeploy.report import rows, schema

    built, job = measured.built, measured.built.job
    verdict = judge(
        measured.comparison,
        max_drop=outcome.recipe.max_drop,
        violations=built.violations,
        stray=measured.stray,
        tolerance_lsb=job.backend.tolerance_lsb,
    )
    size = rows.artifact_bytes(built.artifact, besides=LAYERS)
    calibrated = outcome.statistics is not None and job.calibrated
    return schema.Target(
        target=job.backend.name,
        precision=job.precision,
        folder=job.folder,
        artifact=f"{job.folder}/{built.artifact.main}",
        size_bytes=size,
        compression=round(size_of_files(model_files(outcome.model.path)) / size, 4),
        reader=outcome.recipe.reader if calibrated else None,
        samples=_calibration_samples(outcome, job),
        quantized_ops=rows.quantized_ops(built.artifact),
        steps=_steps(built) if calibrated or not job.calibrated else (),
        pareto=_pareto(built),
        remaining=_remaining(measured.remaining),
        options=rows.plain(job.options),
        warnings=tuple(_warnings(outcome, measured)),
        **rows.verdict_fields(verdict, measured.evidence, [*_remarks(outcome, measured)]),
        **rows.accuracy_fields(measured.comparison),
        **rows.speed_fields(measured.times, getattr(job.options, "threads", None), _batch(outcome)),
    )


def _calibration_samples(outcome: Outcome, job: Job) -> int | None:
    """How many samples a target's ranges or weights were chosen by; None if by none, or if nobody knows."""
    if job.calibrated:
        return outcome.statistics.samples if outcome.statistics else None
    return outcome.samples.calibration.size if job.sampled and outcome.samples.calibration else None


def _steps(built: Built) -> tuple[Step, ...]:
    """The steps taken, or all that the ladder tried."""
    from qdeploy.report import rows, schema

    attempts = built.found.attempts if built.found else ()
    if not attempts:
        return tuple(schema.Step(name=name) for name in built.job.steps)
    return tuple(
        schema.Step(
            name=attempt.step or "none",
            detail=attempt.detail,
            kept=attempt.kept,
            drop=round(attempt.score.drop, rows.DECIMALS) if attempt.score else None,
            sqnr_db=round(attempt.score.sqnr_db, rows.DECIMALS) if attempt.score else None,
            seconds=round(attempt.seconds, 2),
        )
        for attempt in attempts
    )


def _pareto(built: Built) -> tuple[ParetoPoint, ...]:
    """What mixed precision could choose from, if the ladder came so far."""
    from qdeploy.report import rows, schema

    return tuple(
        schema.ParetoPoint(
            kept_float=each.point.nodes,
            sqnr_db=round(each.score.sqnr_db, rows.DECIMALS),
            metric=None if each.score.metric is None else round(each.score.metric, rows.DECIMALS),
            cost=round(each.point.work, rows.DECIMALS),
            latency_ms=None if each.latency_ms is None else round(each.latency_ms, 4),
            chosen=each.chosen,
        )
        for each in (built.found.front if built.found else ())
    )


NAMED_LAYERS = 5
"""Of those that lose most, when a budget is missed."""


def _remaining(remaining: Remaining | None) -> schema.Remaining | None:
    from qdeploy.report import rows, schema

    if remaining is None:
        return None
    layers = (
        schema.RemainingLayer(node=layer.node, op_type=layer.op_type, sqnr_db=round(effect.sqnr_db, rows.DECIMALS))
        for layer in remaining.layers[:NAMED_LAYERS]
        for effect in layer.effects.values()
    )
    return schema.Remaining(gap=round(remaining.gap, rows.DECIMALS), layers=tuple(layers))


def _remarks(outcome: Outcome, measured: Measured) -> Iterator[str]:
    """What the figures of a row rest on."""
    if outcome.samples.remark:
        yield outcome.samples.remark
    if measured.remaining is not None:
        yield f"{measured.remaining.gap:.4f} more than the budget is lost."
        yield from _blamed(measured.remaining.layers[:NAMED_LAYERS])
    if measured.evidence is Evidence.SIMULATED:
        yield "The target's own graph ran on ONNX Runtime's CPU; its latency was not measured."


def _blamed(layers: tuple[LayerSensitivity, ...]) -> Iterator[str]:
    """The layers behind what is left of the loss, if they are known."""
    named = [f"{layer.node} ({effect.sqnr_db:.1f} dB)" for layer in layers for effect in layer.effects.values()]
    if named:
        yield f"Quantized alone, these lose most: {', '.join(named)}."


def _warnings(outcome: Outcome, measured: Measured) -> Iterator[str]:
    job, budget, stray = measured.built.job, outcome.recipe.max_drop, measured.stray
    if job.contract.advice:
        yield job.contract.advice
    if measured.built.quantized is not None and job.contract.form in INTEGER_FORMS:
        layers = measured.built.artifact.layers
        if layers and not any(layer.precision.startswith("int") for layer in layers):
            rules = f"qdeploy backends --ops {job.backend.name}:{job.precision}"
            yield f"No operator of this model became an integer one; {rules} says which do."
    if budget is not None and (warning := budget_warning(budget, measured.comparison.samples)):
        yield warning
    tolerance = job.backend.tolerance_lsb
    if stray is not None and stray.steps > tolerance and not stray.exceeds(tolerance):
        yield f"Up to {stray.steps:.0f} steps of the output from its own QDQ graph: less than quantization changed."


def _manifest(outcome: Outcome) -> Manifest:
    from qdeploy.bundle.manifest import BundledTarget, Manifest, readable_contract
    from qdeploy.report import rows

    preprocessing = outcome.samples.evaluation.preprocessing
    return Manifest(
        qdeploy=package_version("qdeploy"),
        recipe=outcome.recipe.as_json(),
        source=outcome.model.digest,
        inputs=outcome.model.inputs,
        outputs=outcome.model.outputs,
        dims=outcome.model.dims,
        states=outcome.samples.states.outputs,
        preprocessing=preprocessing.to_json() if preprocessing else None,
        targets=tuple(
            BundledTarget(
                target=each.built.job.backend.name,
                precision=each.built.job.precision,
                folder=each.built.job.folder,
                main=each.built.artifact.main,
                contract=readable_contract(each.built.job.contract),
                options=rows.plain(each.built.job.options),
            )
            for each in outcome.measured
        ),
        environment=environment(),
    )
