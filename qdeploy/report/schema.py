"""The JSON files of a bundle that people's scripts read, all of schema 1: report.json, layers.json, and the ranges.

Fields may be added to a schema, never changed. A figure that was not measured is null, never 0. JSON knows no NaN
and no infinity: a figure that is not finite is null too, and its row's `reason` gives its value.

Import this module inside functions: it loads pydantic.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import (  # noqa: TID253  # this module is made of pydantic models and is only imported inside functions
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from qdeploy.backend import Evidence, Layer
from qdeploy.errors import InputError

Interval = tuple[float, float]
"""Lower and upper end of a 95 % confidence interval."""

UPGRADE = "Upgrade: pip install --upgrade qdeploy."


class Value(BaseModel):
    """A frozen part of a JSON document; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_what_is_not_finite(cls, fields: Any) -> Any:
        return {**fields, **dict.fromkeys(_not_finite(fields))} if isinstance(fields, dict) else fields


def _not_finite(fields: Mapping[str, Any]) -> dict[str, float]:
    """The figures that JSON cannot hold, by name; for an interval, the end at fault."""
    ends = {name: value if isinstance(value, (tuple, list)) else (value,) for name, value in fields.items()}
    return {
        name: end
        for name, values in ends.items()
        for end in values
        if isinstance(end, float) and not math.isfinite(end)
    }


class Document(Value):
    """A whole JSON file, with the number of its schema first."""

    schema_number: Literal[1] = Field(default=1, alias="schema")

    def text(self) -> str:
        """The file's content: the same bytes for equal values."""
        return json_text(self.model_dump(mode="json", warnings=False, by_alias=True))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file that holds `text()`.

        Raises:
            InputError: It is missing, damaged, or of a newer schema.
        """
        try:
            data = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}).", "Name a file that qdeploy wrote.") from error
        return validated(cls, data, str(path))


def json_text(data: Any) -> str:
    """JSON as qdeploy writes it: indented, in the given order, characters as themselves, a newline at the end."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


_Document = TypeVar("_Document", bound=Document)


def validated(document: type[_Document], data: Any, name: str) -> _Document:
    """A document from parsed JSON.

    Args:
        document: Which one it should be.
        data: What the JSON held.
        name: What to call the file in messages.

    Raises:
        InputError: Its schema is newer than this version's, or it does not fit the schema.
    """
    schema = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(schema, int):
        raise InputError(f"{name} is no {document.__name__.lower()} of qdeploy: it states no schema.")
    if schema > 1:
        raise InputError(f"{name} was written by a newer qdeploy: schema {schema}, this one reads 1.", UPGRADE)
    try:
        return document.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{name} does not fit schema 1: {place}: {first['msg']}.", UPGRADE) from error


class Latency(Value):
    """Percentiles of the time of one run, in milliseconds.

    Attributes:
        p50: Median.
        p90: 90th percentile.
        p99: 99th percentile.
        runs: How many runs were timed.
        threads: Threads the runtime was given; 0 for one a core; null where that has no meaning.
        batch: Samples in one run.
        p50_interval: Of `p50`.
        quantiles: The fastest run, every 5th percentile, and the slowest run: 21 times.
    """

    p50: float
    p90: float
    p99: float
    runs: int
    threads: int | None = None
    batch: int | None = None
    p50_interval: Interval | None = None
    quantiles: tuple[float, ...] = ()


class Model(Value):
    """The float model: short name, sha256 of its ONNX file, and number of parameters."""

    name: str
    digest: str
    parameters: int


class Metric(Value):
    """The float model's accuracy: the metric's name, its value, and the evaluation samples behind it."""

    name: str
    value: float | None
    samples: int


class Eager(Value):
    """How far the exported ONNX model is from the PyTorch module it came from."""

    max_abs_error: float | None = None
    sqnr_db: float | None = None
    agreement: float | None = None


class Reference(Value):
    """The float32 ONNX model that every target is compared with.

    Attributes:
        metric: Its accuracy, with labels or a metric of the user's.
        size_bytes: Its ONNX file with external data.
        latency_ms: On ORT CPU.
        eager: Against the PyTorch module; null when an ONNX file was given.
    """

    size_bytes: int
    metric: Metric | None = None
    latency_ms: Latency | None = None
    eager: Eager | None = None


class Step(Value):
    """A recovery step that was taken or, by the ladder, tried.

    Attributes:
        name: Of the step; "none" for the plan that the ladder began with.
        detail: In words, what it did, or why it could not be taken.
        kept: Whether the artifact has it.
        drop: Loss of the metric after it, on the samples of the search; null if it was not measured.
        sqnr_db: Of the outputs after it, on the same samples.
        seconds: What taking and measuring it took.
    """

    name: str
    detail: str = ""
    kept: bool = True
    drop: float | None = None
    sqnr_db: float | None = None
    seconds: float | None = None


class ParetoPoint(Value):
    """One choice between accuracy and time: some layers in float, the others quantized.

    Attributes:
        kept_float: Names of the nodes that are given back to float.
        sqnr_db: Of the output against FP32's, on the samples of the search.
        metric: Accuracy on the same samples, by the reference's metric.
        cost: Share of the network's multiplications that are done in float, 0 to 1.
        latency_ms: Median of one run.
        chosen: Whether it is the one in the artifact.
    """

    kept_float: tuple[str, ...]
    sqnr_db: float | None = None
    metric: float | None = None
    cost: float | None = None
    latency_ms: float | None = None
    chosen: bool = False


class RemainingLayer(Value):
    """A layer that loses much.

    Attributes:
        node: Its name.
        op_type: Its ONNX operator.
        sqnr_db: Of the output against FP32's, with this layer alone quantized.
    """

    node: str
    op_type: str
    sqnr_db: float | None = None


class Remaining(Value):
    """What a target loses beyond its budget.

    Attributes:
        gap: By how much the drop exceeds the budget.
        layers: Those that lose most, the worst first.
    """

    gap: float
    layers: tuple[RemainingLayer, ...] = ()


class Output(Value):
    """How one output differs from the reference's, over all evaluation samples.

    Attributes:
        sqnr_db: Null for integers, and where nothing differs.
        cosine: Cosine similarity; null for integers.
        max_abs_error: Null for integers.
        equal: Share of values that are equal, 0 to 1.
    """

    sqnr_db: float | None = None
    cosine: float | None = None
    max_abs_error: float | None = None
    equal: float | None = None


class Target(Value):
    """One row: a target at one precision.

    Attributes:
        target: Backend name.
        precision: For example "int8".
        status: Whether it passed; "unavailable" if it cannot be built here.
        evidence: How the figures were obtained; null without figures.
        reason: Why the status is what it is, and which figures were not finite.
        folder: The target's folder in the bundle.
        artifact: The file or package to open, relative to the bundle.
        size_bytes: All of the artifact's files.
        compression: The reference's size / size.
        metric: Accuracy, by the reference's metric.
        drop: The reference's metric − metric, absolute: 0.01 is one point.
        drop_interval: Of `drop`.
        agreement: Share of samples with the reference's largest output, 0 to 1.
        cosine: Cosine similarity to the reference's first output.
        sqnr_db: Of the first output, against the reference's.
        max_abs_error: Of the outputs, against the reference's.
        outputs: The figures of each output, by name, in the model's order.
        evaluation_samples: Samples that the figures above rest on.
        evaluation_digest: sha256 of those samples and their labels, in order, before preprocessing.
        latency_ms: On the target's runtime.
        baseline_latency_ms: FP32 on the same runtime and device.
        speedup: Baseline p50 / p50.
        speedup_interval: Of `speedup`.
        reader: Calibration reader, if it was calibrated.
        samples: Calibration samples, if it was calibrated.
        quantized_ops: Operators by what they compute in ("int8", "float", …), counted in the built artifact.
        steps: Recovery steps, in order.
        remaining: What is lost beyond the budget; null if the budget is met or none was given.
        pareto: What mixed precision could choose from, from the fastest to the most accurate; empty without it.
        options: The backend's options.
        warnings: What the user should know though it decides nothing.
    """

    target: str
    precision: str
    status: Literal["pass", "fail", "unavailable"]
    evidence: Evidence | None = None
    reason: str = ""
    folder: str | None = None
    artifact: str | None = None
    size_bytes: int | None = None
    compression: float | None = None
    metric: float | None = None
    drop: float | None = None
    drop_interval: Interval | None = None
    agreement: float | None = None
    cosine: float | None = None
    sqnr_db: float | None = None
    max_abs_error: float | None = None
    outputs: Mapping[str, Output] = Field(default_factory=dict)
    evaluation_samples: int | None = None
    evaluation_digest: str | None = None
    latency_ms: Latency | None = None
    baseline_latency_ms: Latency | None = None
    speedup: float | None = None
    speedup_interval: Interval | None = None
    reader: str | None = None
    samples: int | None = None
    quantized_ops: Mapping[str, int] = Field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    pareto: tuple[ParetoPoint, ...] = ()
    remaining: Remaining | None = None
    options: Mapping[str, JsonValue] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _null_what_is_not_finite(cls, fields: Any) -> Any:
        figures = _not_finite(fields) if isinstance(fields, dict) else {}
        if not figures:
            return fields
        named = ", ".join(f"{name} = {value}" for name, value in figures.items())
        reason = f"{fields.get('reason', '')} Not finite, hence null: {named}.".strip()
        return {**fields, **dict.fromkeys(figures), "reason": reason}


class Report(Document):
    """report.json.

    Attributes:
        qdeploy: The version that wrote it.
        model: The model that was exported.
        reference: The float32 model's own figures.
        targets: One row for each target and precision, in the order asked for.
        max_drop: The allowed drop of the metric; null if none was given.
        environment: Versions, processor and system, by name.
        notes: What concerns all targets.
    """

    qdeploy: str
    model: Model
    reference: Reference
    targets: tuple[Target, ...]
    max_drop: float | None = None
    environment: Mapping[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """For the command line: 3 if a target could not be built here, else 1 if one failed, else 0."""
        states = {target.status for target in self.targets}
        return 3 if "unavailable" in states else int("fail" in states)


class Layers(Document):
    """layers.json: what each ONNX node became in one target's artifact."""

    layers: tuple[Layer, ...]


class TensorRange(Value):
    """One activation of a quantized model: its values over the calibration samples, and the range chosen for it.

    Attributes:
        name: The tensor's name in the graph.
        integer: What it is stored in, for example "uint8".
        scale: Real size of one step.
        zero_point: The integer that stands for zero.
        range: Lower and upper end of the values that the integers stand for.
        observed: The smallest and the largest value.
        clipped: Share of the values that lie more than half a step outside the range, 0 to 1.
        counts: Values in bins of equal width from the smallest to the largest value, rounded.
    """

    name: str
    integer: str
    scale: float
    zero_point: int
    range: tuple[float, float]
    observed: tuple[float, float]
    clipped: float
    counts: tuple[int, ...]


class Ranges(Document):
    """calibration/<folder>.json: the activations of one target's artifact."""

    tensors: tuple[TensorRange, ...]

    def text(self) -> str:
        """The file's content, one line a tensor: their histograms are long."""
        lines = ",\n".join(
            json.dumps(each.model_dump(mode="json", warnings=False), ensure_ascii=False) for each in self.tensors
        )
        return f'{{"schema": {self.schema_number}, "tensors": [\n{lines}\n]}}\n'


class Effect(Value):
    """What one layer in one type does to the output; null where nothing was lost, or all.

    Attributes:
        sqnr_db: Of the output.
        kl_divergence: Of the classes, in nats.
        agreement: Share of rows with the float model's answer, 0 to 1.
        metric: The task's metric.
    """

    sqnr_db: float | None = None
    kl_divergence: float | None = None
    agreement: float | None = None
    metric: float | None = None


class LayerSensitivity(Value):
    """One layer alone in each type, by the type's name."""

    node: str
    op_type: str
    weight: str
    effects: Mapping[str, Effect]


class Sensitivity(Document):
    """What `qdeploy analyze sensitivity --json` prints."""

    analysis: Literal["sensitivity"]
    model: str
    target: str
    samples: int
    metric: str | None = None
    reference_metric: float | None = None
    layers: tuple[LayerSensitivity, ...]


class Limits(Value):
    """What may get worse: differences of accuracy and SQNR, ratios of latency and size."""

    accuracy_loss: float
    sqnr_loss: float
    slowdown: float
    growth: float


class Figure(Value):
    """One figure of a target in two bundles.

    Attributes:
        name: Its field in report.json; `latency_ms` stands for its median.
        title: What it is called.
        value: In the new bundle.
        base: In the one that it is compared with.
        change: New − old of accuracy, agreement and SQNR; new / old of size and latency.
        interval: Of `change`, 95 %, where both were measured with one.
        limit: How much worse it may be; null where it decides nothing.
        standing: Of a latency whose interval holds 1, "same".
        beyond: Whether it is worse than the limit allows.
    """

    name: str
    title: str
    value: float
    base: float
    change: float
    interval: Interval | None = None
    limit: float | None = None
    standing: Literal["better", "same", "worse"]
    beyond: bool = False


class LayerChange(Value):
    """A node that computes in something else than before; null where a bundle does not have it."""

    node: str
    precision: str | None
    base: str | None


class Difference(Value):
    """One target in two bundles; `beyond` says in sentences what is worse than allowed."""

    name: str
    status: Literal["pass", "fail", "unavailable"]
    base_status: Literal["pass", "fail", "unavailable"]
    figures: tuple[Figure, ...]
    layers: tuple[LayerChange, ...]
    beyond: tuple[str, ...]


class Differences(Document):
    """What `qdeploy report NEW --compare BASE --json` prints.

    Attributes:
        model: Name of the new bundle's model.
        new: What the new bundle is called.
        base: What the other is called.
        metric: What accuracy is measured by; null without one.
        limits: Beyond them, what got worse counts.
        targets: Those that both have.
        added: Targets that only the new bundle has.
        missing: Targets that only the other has: each is worse than allowed.
        beyond: What is worse than allowed, one sentence each; empty if all is well.
        notes: What could not be compared, and why.
    """

    model: str
    new: str
    base: str
    metric: str | None
    limits: Limits
    targets: tuple[Difference, ...]
    added: tuple[str, ...]
    missing: tuple[str, ...]
    beyond: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """For the command line: 1 if something is worse than allowed, else 0."""
        return int(bool(self.beyond))
