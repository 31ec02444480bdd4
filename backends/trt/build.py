"""ONNX → plan: parsing, profiles, and the build with its progress and its way out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdeploy.backend import no_progress
from qdeploy.backends.trt.contract import Options
from qdeploy.backends.trt.library import Library, Messages, logged
from qdeploy.errors import InputError, UnavailableError
from qdeploy.model import DimRange, TensorSpec

Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Smallest, typical and largest shape of each input with a dynamic dimension, by name."""


@dataclass(frozen=True)
class Build:
    """A built engine.

    Attributes:
        plan: Its bytes.
        layer_log: The builder's account of its layers; empty if it gave none.
    """

    plan: bytes
    layer_log: str


def profile(inputs: Sequence[TensorSpec], dims: Mapping[str, DimRange]) -> Profile:
    """The shapes between which an engine must run.

    Raises:
        InputError: A dynamic dimension has no range.
    """
    shapes = {}
    for spec in inputs:
        missing = [dim for dim in spec.shape if isinstance(dim, str) and dim not in dims]
        if missing:
            what = f"The input {spec} has the dynamic dimension {missing[0]!r}, and TensorRT must know its range."
            raise InputError(what, f"Add --dim {missing[0]}=minimum:typical:maximum, for example {missing[0]}=1:1:8.")
        if any(isinstance(dim, str) for dim in spec.shape):
            ranges = [DimRange(d, d, d) if isinstance(d, int) else dims[d] for d in spec.shape]
            corners = ([getattr(r, end) for r in ranges] for end in ("minimum", "typical", "maximum"))
            smallest, typical, largest = map(tuple, corners)
            shapes[spec.name] = (smallest, typical, largest)
    return shapes


def check_parses(trt: Library, path: Path) -> None:
    """Parse a model without building it.

    Raises:
        UnavailableError: TensorRT cannot read one of its nodes.
    """
    with logged(trt) as (logger, _):
        _parsed(trt, trt.module.Builder(logger), logger, path)


def build(
    trt: Library, path: Path, shapes: Profile, options: Options, on_progress: Callable[[float], None] = no_progress
) -> Build:
    """Build an engine. An interrupt cancels the build at its next step, and then takes its course.

    Raises:
        InputError: The options do not fit the library.
        UnavailableError: TensorRT cannot read a node, or cannot build the engine.
    """
    with logged(trt) as (logger, messages):
        builder = trt.module.Builder(logger)
        network, parser = _parsed(trt, builder, logger, path)
        monitor = _monitor(trt.module, on_progress)
        config = _config(trt, builder, shapes, options)
        config.progress_monitor = monitor
        # In a thread of its own, so that a signal is seen while the builder works.
        with ThreadPoolExecutor(1) as pool:
            building = pool.submit(builder.build_serialized_network, network, config)
            try:
                plan = building.result()
            except BaseException:
                monitor.cancelled = True
                raise
        del parser  # it held the weights that the network refers to
        if plan is None:
            raise _refusal(messages)
        on_progress(1.0)
        return Build(bytes(plan), next((text for _, text in messages if text.startswith("Layers:")), ""))


def _parsed(trt: Library, builder: Any, logger: Any, path: Path) -> tuple[Any, Any]:
    """The strongly typed network that a model is (precision is what its graph says), and the parser."""
    network = builder.create_network(1 << int(trt.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.module.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        where = "; ".join(f"{_place(e)}: {_telling(e.desc())}" for e in errors)
        what = f"{trt.name} cannot read {path.name}: {where}."
        raise UnavailableError(what, _cure(what, "Replace the operator in the model, or choose another target."))
    return network, parser


def _place(error: Any) -> str:
    return f"{error.node_name()} ({error.node_operator()})" if error.node_name() else "a constant"


def _telling(text: str) -> str:
    """What the library says, without the line on CUDA that it adds to every refusal on a machine without a GPU."""
    lines = [line.strip().rstrip(".") for line in text.splitlines() if "catchCudaError" not in line]
    return "; ".join(filter(None, lines)) or "it does not say why"


def _config(trt: Library, builder: Any, shapes: Profile, options: Options) -> Any:
    module = trt.module
    config = builder.create_builder_config()
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if options.workspace_mib:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.arch and not trt.cross_builds:
        what = f"{trt.name} builds for the GPU of this machine, not for {', '.join(options.arch)}."
        raise InputError(what, "Leave out tensorrt.arch, or install tensorrt-rtx instead.")
    if options.arch:
        config.num_compute_capabilities = len(options.arch)
        for index, name in enumerate(options.arch):
            config.set_compute_capability(getattr(module.ComputeCapability, name.upper()), index)
    if shapes:
        optimization = builder.create_optimization_profile()
        for name, corners in shapes.items():
            optimization.set_shape(name, *corners)
        config.add_optimization_profile(optimization)
    return config


def _monitor(module: Any, on_progress: Callable[[float], None]) -> Any:
    """What the builder tells of its progress, and asks whether to go on."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.cancelled = False
            self.phases = Phases()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases.start(name, parent, steps)

        def step_complete(self, name: str, step: int) -> bool:
            on_progress(self.phases.complete(name, step))
            return not self.cancelled

        def phase_finish(self, name: str) -> None:
            """Its steps have told; a cancelled phase ends without them."""

    return Monitor()


class Phases:
    """How far the phases of a build are, each of which may run inside a step of another."""

    def __init__(self) -> None:
        self._parents: dict[str, str | None] = {}
        self._steps: dict[str, int] = {}
        self._done: dict[str, float] = {}
        self._told = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        self._parents[name], self._steps[name], self._done[name] = parent, max(steps, 1), 0.0

    def complete(self, name: str, step: int) -> float:
        """A step is over; the part of everything that is done, which never falls."""
        self._done[name] = step + 1.0
        part = 0.0
        while name in self._steps:
            part = min((self._done[name] + part) / self._steps[name], 1.0)
            parent = self._parents[name]
            if parent is None:
                self._told = max(self._told, part)
                break
            name = parent
        return self._told


_INSPECT = "qdeploy inspect --target tensorrt names every such node."

CURES = (
    ("FP32 GEMM is not supported", "Choose fp16 or int8-fp16 for sm75, or leave it out of tensorrt.arch."),
    (r"HW-specific datatypes: \w*fp8", "FP8 runs on sm89 and later: leave the older ones out of tensorrt.arch."),
    ("HW-specific datatypes: b16", "bfloat16 runs on sm80 and later: leave sm75 out of tensorrt.arch."),
    ("within workspace limit", "Raise tensorrt.workspace_mib, or leave it at 0."),
    ("shiftIsAllZeros|UINT8|[Uu]nsupported datatype|import initializer|must have type FP8", _INSPECT),
    ("no CUDA-capable device|CUDA initialization", "TensorRT needs its GPU and driver; tensorrt-rtx builds without."),
)
"""What to do about what the builder says, as far as it is known."""


def _cure(text: str, otherwise: str) -> str:
    return next((cure for pattern, cure in CURES if re.search(pattern, text)), otherwise)


def _refusal(messages: Messages) -> UnavailableError:
    """Why a build came to nothing."""
    errors = [text for severity, text in messages if severity in ("ERROR", "INTERNAL_ERROR")]
    what = f"TensorRT cannot build the engine: {_telling(chr(10).join(errors))}."
    return UnavailableError(what, _cure(what, "Keep the operator it names in float, or choose another precision."))
