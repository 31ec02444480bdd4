"""What a run is to do, as one frozen value: the command line, Python and recipe files all end here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qdeploy.errors import InputError
from qdeploy.model import ModelSource
from qdeploy.samples.preprocessing import Preprocessing


@dataclass(frozen=True)
class TargetRequest:
    """One target at one precision.

    Attributes:
        name: Backend name.
        precision: As the backend lists them; empty for its first.
        options: The backend's options as texts.
    """

    name: str
    precision: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, options: Mapping[str, str] | None = None) -> TargetRequest:
        """What `--target` says: NAME or NAME:PRECISION."""
        name, _, precision = text.partition(":")
        return cls(name, precision, options or {})


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a run; the values are as on the command line.

    Attributes:
        source: The model.
        targets: In the order of the report; none for what needs none, such as calibrating.
        calibration: DATA to calibrate with, or None.
        statistics: A statistics file to use instead of calibrating, or None.
        evaluation: DATA to measure accuracy with; None for the calibration samples.
        preprocessing: How images become inputs.
        samples: Most calibration samples to use.
        reader: Calibration reader.
        granularity: Of the weights.
        keep: Nodes that stay float: "first", "last", patterns.
        recover: Recovery steps, or None for each precision's default.
        metric: A metric's name, `file.py:callable`, a Python callable, or None for top1 where there are labels.
        max_drop: The allowed drop of the metric, absolute, or None.
    """

    source: ModelSource
    targets: tuple[TargetRequest, ...]
    calibration: Any = None
    statistics: Path | None = None
    evaluation: Any = None
    preprocessing: Preprocessing | None = None
    samples: int | None = None
    reader: str = "mse"
    granularity: Literal["per-channel", "per-tensor"] = "per-channel"
    keep: tuple[str, ...] = ()
    recover: tuple[str, ...] | None = None
    metric: Any = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        if self.calibration is not None and self.statistics is not None:
            what = "Both --calibration and --statistics are given."
            raise InputError(what, "Give one: data to calibrate with, or the statistics of an earlier calibration.")

    def as_json(self) -> dict[str, Any]:
        """The recipe as plain data for the bundle; what cannot be written down is named by its type."""
        return {
            "model": {
                "source": self.source.text,
                "inputs": [str(spec) for spec in self.source.inputs],
                "dims": {n: f"{d.minimum}:{d.typical}:{d.maximum}" for n, d in self.source.dims.items()},
            },
            "samples": {"preprocessing": self.preprocessing.to_json() if self.preprocessing else None},
            "calibration": {
                "data": _written(self.calibration),
                "statistics": _written(self.statistics),
                "reader": self.reader,
                "samples": self.samples,
            },
            "quantization": {
                "granularity": self.granularity,
                "keep": list(self.keep),
                "recover": None if self.recover is None else list(self.recover),
            },
            "evaluation": {"data": _written(self.evaluation)},
            "parity": {"metric": _written(self.metric), "max_drop": self.max_drop},
            "target": [{"name": t.name, "precision": t.precision, **t.options} for t in self.targets],
        }


def _written(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return str(value) if isinstance(value, Path) else f"a {type(value).__name__} given from Python"
