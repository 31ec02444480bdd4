"""The two JSON files of a bundle that people's scripts read: report.json and layers.json, both of schema 1.

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
        return json_text(self.model_dump(mode="json", by_alias=True))

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
    """

    p50: float
    p90: float
    p99: float
    runs: int
    threads: int | None = None
    batch: int | None = None


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
        latency_ms: On the target's runtime.
        baseline_latency_ms: FP32 on the same runtime and device.
        speedup: Baseline p50 / p50.
        speedup_interval: Of `speedup`.
        reader: Calibration reader, if it was calibrated.
        samples: Calibration samples, if it was calibrated.
        quantized_ops: Operators by what they compute in ("int8", "float", …), counted in the built artifact.
        steps: Recovery steps, in order.
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
    latency_ms: Latency | None = None
    baseline_latency_ms: Latency | None = None
    speedup: float | None = None
    speedup_interval: Interval | None = None
    reader: str | None = None
    samples: int | None = None
    quantized_ops: Mapping[str, int] = Field(default_factory=dict)
    steps: tuple[Step, ...] = ()
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
        environment: Versions, processor and system, by name.
        notes: What concerns all targets.
    """

    qdeploy: str
    model: Model
    reference: Reference
    targets: tuple[Target, ...]
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
