"""One target of a run: float model → plan → graph → artifact, in the form that the target takes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from qdeploy.backend import Artifact, Evidence, Runner, no_progress
from qdeploy.graph import load_graph
from qdeploy.ladder import Choice, Climb, Score, search
from qdeploy.model import FloatModel, QuantizedModel
from qdeploy.outcome import (
    Built,
    Job,
)
from qdeploy.parity import harness
from qdeploy.parity.compare import compare
from qdeploy.parity.metrics import Metric
from qdeploy.parity.remembered import Remembered
from qdeploy.plan import Learned, QuantPlan, matching_rule, plan, plan_from
from qdeploy.quantize.dynamic import quantize_dynamic
from qdeploy.quantize.float16 import cast_quantized, to_float16
from qdeploy.quantize.half import to_half
from qdeploy.quantize.lint import lint
from qdeploy.quantize.static import quantize
from qdeploy.quantize.weight_qdq import quantize_weight_qdq
from qdeploy.quantize.weights import quantize_weights
from qdeploy.reader import CalibrationReader
from qdeploy.recover.gptq import gptq_weights
from qdeploy.recover.recovery import Means, Recovery
from qdeploy.recover.steps import STEPS, taken
from qdeploy.report.ranges import tensor_ranges
from qdeploy.samples.source import SampleSource
from qdeploy.scheme import Form, QuantContract
from qdeploy.session import SessionRunner
from qdeploy.statistics import Statistics

if TYPE_CHECKING:
    from qdeploy.report.schema import TensorRange


@dataclass(frozen=True)
class Search:
    """What the ladder may look at while it searches.

    Attributes:
        samples: The part of the evaluation samples that no verdict rests on.
        metric: What may drop.
        max_drop: By how much.
    """

    samples: SampleSource
    metric: Metric
    max_drop: float


@dataclass(frozen=True)
class Making:
    """What there is to make a target's graph of.

    Attributes:
        job: The target.
        model: The prepared float model.
        statistics: Of the calibration samples, if a target needs them.
        reader: Chooses ranges.
        folder: Where to write what does not last.
        samples: The calibration samples themselves; None where only their statistics are at hand.
        keep: Nodes that stay float.
        search: What the ladder looks at; None if the steps are given.
        learned: The ranges and scales that training settled; None if they come from the statistics.
        readers: All that could choose ranges.
    """

    job: Job
    model: FloatModel
    statistics: Statistics | None
    reader: CalibrationReader
    folder: Path
    samples: SampleSource | None = None
    keep: tuple[str, ...] = ()
    search: Search | None = None
    learned: Learned | None = None
    readers: tuple[CalibrationReader, ...] = ()

    def means(self, folder: Path) -> Means:
        """What recovery steps may use; they write into an empty folder."""
        return Means(self.samples, self.reader, self.keep, folder, self.readers)


def build(making: Making, bundle: Path, on_progress: Callable[[float], None] = no_progress) -> Built:
    """Write the graph in the form that the target is given, and lower it into its folder of the bundle."""
    job, folder = making.job, made(bundle / making.job.folder)
    quantized: QuantizedModel | None = None
    found: Climb[Recovery] | None = None
    ranges: tuple[TensorRange, ...] = ()
    if job.calibrated and making.learned is not None:
        settled = plan_from(making.model, making.learned, job.contract, making.keep)
        quantized = FROM_PLAN[job.contract.form](settled, made(making.folder / "quantized"))
    elif job.calibrated:
        found = _recovered(making)
        quantized = FROM_PLAN[job.contract.form](found.best.plan, made(making.folder / "quantized"))
        ranges = tensor_ranges(found.best)
    elif job.contract.form is not Form.FLOAT:
        quantized = _without_ranges(making)
    artifact = job.backend.lower(quantized or making.model, job.precision, folder, job.options, on_progress)
    violations = _violations(quantized, artifact) if quantized else ()
    return Built(job, artifact, _baseline(making, artifact), quantized, violations, found, ranges)


def _without_ranges(making: Making) -> QuantizedModel:
    """The graph of a target whose ranges come from no samples; its weights may be rounded by samples all the same."""
    model, contract, keep, folder = making.model, making.job.contract, making.keep, made(making.folder / "quantized")
    if not making.job.steps:
        return WITHOUT_RANGES[contract.form](model, contract, folder, keep)
    assert making.samples is not None
    replaced = gptq_weights(model, contract, keep, making.samples, making.folder)
    return FROM_WEIGHTS[contract.form](model, contract, folder, keep, replaced)


def _baseline(making: Making, artifact: Artifact) -> Artifact | None:
    """FP32 on the target's own runtime; None where that is not at hand to be timed."""
    job = making.job
    if job.backend.open(artifact, job.options).evidence is not Evidence.EXECUTED:
        return None
    return job.backend.lower(making.model, "fp32", made(making.folder / "baseline"), job.options)


def _recovered(making: Making) -> Climb[Recovery]:
    """The plan and its statistics after the steps asked for, or those that the ladder finds, and what it tried."""
    assert making.statistics is not None
    drafted = plan(making.model, making.statistics, making.job.contract, making.reader, making.keep)
    start = Recovery(drafted, making.statistics, making.means(made(making.folder / "steps")))
    if making.search is None:
        return Climb(taken(start, making.job.steps), ())
    reference = Remembered(harness.as_written(making.model.path), made(making.folder / "reference"))
    found = search(start, STEPS, partial(_score, making, making.search, reference), making.search.max_drop)
    return replace(found, front=_timed(making, found.front))


def _score(making: Making, searching: Search, reference: Runner, candidate: QuantPlan) -> Score:
    """How good a plan is: its QDQ graph against FP32 on the samples of the search."""
    with tempfile.TemporaryDirectory(dir=making.folder) as folder:
        path = FROM_PLAN[making.job.contract.form](candidate, Path(folder)).path
        with reference, SessionRunner(path) as runner:
            pair = harness.FLOAT, making.job.folder
            runners = dict(zip(pair, (reference, runner), strict=True))
            comparison = compare(runners, [pair], searching.samples, searching.metric)[pair]
    drop = math.inf if comparison.drop is None else comparison.drop
    sqnr_db = -math.inf if comparison.sqnr_db is None else comparison.sqnr_db
    return Score(drop, sqnr_db, comparison.metric)


def _timed(making: Making, front: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """The front with latencies, side by side, where the target itself runs here."""
    job, runners = making.job, dict[str, Runner]()
    assert making.search is not None
    if not front:
        return front
    for place, each in enumerate(front):
        folder = made(making.folder / f"front-{place}")
        quantized = FROM_PLAN[job.contract.form](each.recovery.plan, made(folder / "quantized"))
        artifact = job.backend.lower(quantized, job.precision, made(folder / "artifact"), job.options)
        runners[str(place)] = job.backend.open(artifact, job.options)
        if runners[str(place)].evidence is not Evidence.EXECUTED:
            return front
    times = harness.latencies(runners, next(iter(making.search.samples)).inputs)
    return tuple(replace(each, latency_ms=times[str(place)].p50) for place, each in enumerate(front))


def _violations(quantized: QuantizedModel, artifact: Artifact) -> tuple[str, ...]:
    """How what was built departs from what was asked for."""
    contract = quantized.contract
    broken = [f"{v.node}: {v.what}" for v in lint(load_graph(quantized.path), contract)]
    nodes = {str(node.name): node for node in load_graph(quantized.float_model.path).graph.all_nodes()}
    for layer in artifact.layers:
        if layer.node in quantized.quantized_nodes and layer.precision in ("fp32", "fp16"):
            rule = matching_rule(contract, nodes[layer.node], frozenset())
            why = f"; the rule: {rule.reason}" if rule and rule.quantizes else ""
            asked = "int4" if contract.precision == "int4" else "int8"
            broken.append(f"{layer.node} ({layer.op_type}) was asked to be {asked} and became {layer.precision}{why}")
    return tuple(broken)


def made(folder: Path) -> Path:
    """A folder that was not there before."""
    folder.mkdir()
    return folder


FROM_PLAN: Mapping[Form, Callable[[QuantPlan, Path], QuantizedModel]] = MappingProxyType(
    {
        Form.QDQ: quantize,
        Form.QDQ_FLOAT16: lambda settled, folder: cast_quantized(quantize(settled, folder), made(folder / "float16")),
    }
)
"""How a plan is written for a target."""


WITHOUT_RANGES: Mapping[Form, Callable[[FloatModel, QuantContract, Path, tuple[str, ...]], QuantizedModel]] = (
    MappingProxyType(
        {
            Form.DYNAMIC: quantize_dynamic,
            Form.WEIGHTS: quantize_weights,
            Form.WEIGHT_QDQ: quantize_weight_qdq,
            Form.HALF: to_half,
            Form.FLOAT16: to_float16,
        }
    )
)
"""How a float model is written for a target whose ranges come from no samples."""


FROM_WEIGHTS = MappingProxyType({Form.WEIGHTS: quantize_weights, Form.WEIGHT_QDQ: quantize_weight_qdq})
"""How a float model is written with weights that samples have rounded."""
