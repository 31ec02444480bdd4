"""The contract of a target: what a plug-in must offer so that the pipeline can lower to it, run it and prove it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from qdeploy.errors import InputError
from qdeploy.model import FloatModel, QuantizedModel
from qdeploy.registry import suggestion
from qdeploy.scheme import QuantContract

Arrays = Mapping[str, NDArray[Any]]
"""Model inputs or outputs by name, batch included."""


def no_progress(fraction: float) -> None:
    """Tells nobody how much is done."""


class Evidence(StrEnum):
    """How a figure was obtained."""

    EXECUTED = "executed"
    """On the target's own runtime."""
    INTERPRETED = "interpreted"
    """The saved package, run by our interpreter."""
    SIMULATED = "simulated"
    """The quantized ONNX graph on ORT CPU."""


@dataclass(frozen=True)
class Availability:
    """Whether a target can be built on this machine; if not, why, and how to get it."""

    ok: bool
    reason: str = ""
    cure: str = ""


@dataclass(frozen=True)
class Layer:
    """What one ONNX node became in the built artifact.

    Attributes:
        node: Name of the node in the float model.
        op_type: Its ONNX operator.
        layer: The target's own name for what runs it.
        inputs: Type of each input ("int8", "fp32", …).
        weights: Type of its weights, or None without weights.
        outputs: Type of each output.
        precision: What it computes in: int8, fp16, fp32, fp8 or unknown; of integer weights under float activations,
            their type: int8 or int4.
        fused_with: Names of the nodes that run in the same layer.
    """

    node: str
    op_type: str
    layer: str
    inputs: tuple[str, ...]
    weights: str | None
    outputs: tuple[str, ...]
    precision: str
    fused_with: tuple[str, ...] = ()


@dataclass(frozen=True)
class Artifact:
    """What a backend wrote.

    Attributes:
        target: Backend name.
        precision: Precision it was built for.
        directory: Folder that holds all of its files and nothing else.
        main: The file to open, relative to `directory`.
        layers: What each node became, read from what was built.
    """

    target: str
    precision: str
    directory: Path
    main: str
    layers: tuple[Layer, ...]

    @property
    def path(self) -> Path:
        """The file to open."""
        return self.directory / self.main


class Runner(ABC):
    """Runs an artifact. A context manager: resources are taken on entry and given back on exit."""

    evidence: ClassVar[Evidence]

    @abstractmethod
    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name for whole model inputs by name."""

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Backend(ABC):
    """A target.

    Attributes:
        name: As in `--target`.
        summary: One line for `qdeploy backends`.
        precisions: What `--target name:PRECISION` takes; the first is the default.
        options_type: A frozen dataclass of the target's options, each with a default.
        tolerance_lsb: How far the artifact may stray from its own QDQ graph, in steps of the quantized output.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    options_type: ClassVar[type]
    tolerance_lsb: ClassVar[float]

    @abstractmethod
    def availability(self) -> Availability:
        """Whether this machine can build it."""

    @abstractmethod
    def contract(self, precision: str, options: Any) -> QuantContract:
        """The target's rules for one of its precisions."""

    def operators(self) -> Mapping[str, str]:
        """Each ONNX operator that it takes → what it honours of it; empty where it has no list of its own."""
        return {}

    def check(self, model: FloatModel, precision: str, options: Any) -> None:  # noqa: B027 - most targets take any model
        """Refuse, before anything is calibrated, a float model that cannot be built at this precision.

        Raises:
            InputError: Something that the user can say is missing or wrong.
            UnavailableError: The target cannot build it here.
        """

    @abstractmethod
    def lower(
        self,
        model: FloatModel | QuantizedModel,
        precision: str,
        directory: Path,
        options: Any,
        on_progress: Callable[[float], None] = no_progress,
    ) -> Artifact:
        """Build the artifact in an empty folder. A FloatModel at "fp32" gives the baseline for speed.

        Args:
            model: In the form that the contract of the precision names.
            precision: One that the target takes.
            directory: Where to write, and nowhere else.
            options: The target's own.
            on_progress: Told now and then which part of the work is done, from 0 to 1, by whatever thread does it.

        Raises:
            UnavailableError: The target cannot build it here.
        """

    @abstractmethod
    def open(self, artifact: Artifact, options: Any) -> Runner:
        """A runner for an artifact, ready for `with`."""


def parse_options(backend: type[Backend], values: Mapping[str, str]) -> Any:
    """A backend's options from texts, for example {"threads": "2"}; those not given keep their defaults.

    Raises:
        InputError: An option that the backend does not have, or a value that does not fit its type.
    """
    types = get_type_hints(backend.options_type)
    known = [f.name for f in dataclasses.fields(backend.options_type)]
    for key in values:
        if key not in known:
            raise InputError(f"{backend.name} has no option {key!r}.", suggestion(key, known))
    parsed = {key: _parse_value(backend.name, key, text, types[key]) for key, text in values.items()}
    return backend.options_type(**parsed)


def _parse_value(target: str, key: str, text: str, wanted: Any) -> Any:
    choices = get_args(wanted) if get_origin(wanted) is not tuple else ()
    if choices and text in choices:
        return text
    try:
        if wanted is bool and text in ("true", "false"):
            return text == "true"
        if get_origin(wanted) is tuple:
            return tuple(part.strip() for part in text.split(",") if part.strip())
        if wanted in (int, float, str) and not choices:
            return wanted(text)
    except ValueError:
        pass
    takes = ", ".join(map(str, choices)) or ("true or false" if wanted is bool else getattr(wanted, "__name__", "text"))
    raise InputError(f"The option {target}.{key} cannot be {text!r}.", f"It takes: {takes}.")


def option_text(value: Any) -> str:
    """An option's value as `parse_options` takes it: true or false, commas between the parts of a tuple."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def input_arrays(inputs: Arrays) -> dict[str, NDArray[Any]]:
    """Inputs made contiguous, as runtimes want them."""
    return {name: np.ascontiguousarray(array) for name, array in inputs.items()}
