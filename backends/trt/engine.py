"""Running a plan on a GPU, and telling beforehand whether it fits there: a plan that does not is built anew."""

from __future__ import annotations

import ctypes
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from qdeploy.backend import Arrays, Evidence, Runner, input_arrays
from qdeploy.backends.trt.build import Profile, build
from qdeploy.backends.trt.contract import Options
from qdeploy.backends.trt.library import Library, library, logged
from qdeploy.errors import InputError, InternalError, UnavailableError
from qdeploy.graph import describe
from qdeploy.model import FloatModel

MODEL, PLAN, RECORD = "model.onnx", "model.plan", "plan.json"

MAGIC = b"vtrt"
"""How plans of TensorRT-RTX begin; bytes 24 to 27 are its version (observed with 1.7, documented nowhere)."""


@dataclass(frozen=True)
class Record:
    """What a plan was built with, so that it can be told whether it fits, and be built again.

    Attributes:
        library: Name of the Python module.
        version: Of the library.
        architectures: Compute capabilities it was built for; empty for those that the builder takes by default.
        profile: Smallest, typical and largest shapes of dynamic inputs.
    """

    library: str
    version: str
    architectures: tuple[str, ...]
    profile: Profile

    @classmethod
    def of(cls, trt: Library, options: Options, shapes: Profile) -> Record:
        """What is being built now. TensorRT itself builds for the device at hand."""
        architectures = options.arch if trt.cross_builds else (device_architecture(),)
        return cls(trt.module.__name__, trt.module.__version__, architectures, shapes)

    def write(self, directory: Path) -> None:
        """Write it beside the plan."""
        (directory / RECORD).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")

    @classmethod
    def read(cls, directory: Path) -> Record:
        """The record beside a plan."""
        fields = json.loads((directory / RECORD).read_text("utf-8"))
        shapes: Profile = {name: (tuple(a), tuple(b), tuple(c)) for name, (a, b, c) in fields["profile"].items()}
        return cls(fields["library"], fields["version"], tuple(fields["architectures"]), shapes)


def device_architecture() -> str:
    """The first device's compute capability, such as "sm89"."""
    driver, parts = ctypes.CDLL("libcuda.so.1"), []
    driver.cuInit(0)
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        value = ctypes.c_int(0)
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
        parts.append(str(value.value))
    return f"sm{''.join(parts)}"


def misfit(header: bytes, record: Record, module: str, version: str, device: str) -> str:
    """Why a plan must not be loaded; empty if it fits.

    Args:
        header: The first bytes of the plan.
        record: What it was built with.
        module: The library that would load it.
        version: Of the library.
        device: The device's compute capability.
    """
    if record.library == "tensorrt_rtx" and not header.startswith(MAGIC):
        return f"it does not begin with {MAGIC!r}, so it is damaged or no plan of {record.library}"
    if (record.library, record.version) != (module, version):
        return f"it was built by {record.library} {record.version}, and {module} {version} is installed"
    written = ".".join(map(str, header[24:28]))
    if record.library == "tensorrt_rtx" and written != version:
        return f"its header says version {written}, and {module} {version} is installed"
    if record.architectures and device not in record.architectures:
        return f"it was built for {', '.join(record.architectures)}, and the device is {device}"
    return ""


class EngineRunner(Runner):
    """Runs a plan on the first CUDA device. torch holds the memory."""

    evidence = Evidence.EXECUTED

    def __init__(self, directory: Path, options: Options) -> None:
        self._directory = directory
        self._options = options
        self._model: FloatModel = describe(directory / MODEL, directory.name, {})
        self._engine: Any = None
        self._context: Any = None

    def __enter__(self) -> Self:
        _torch()
        trt = library()
        with logged(trt) as (logger, messages):
            self._engine = trt.module.Runtime(logger).deserialize_cuda_engine(self._plan(trt))
            if self._engine is None:
                errors = "; ".join(text for severity, text in messages if severity in ("ERROR", "INTERNAL_ERROR"))
                raise UnavailableError(f"{trt.name} cannot load the engine: {errors or 'it does not say why'}.")
            self._context = self._engine.create_execution_context()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context = self._engine = None

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name; the time that it takes includes the copies to the device and back.

        Raises:
            InputError: An input is missing, or is not what the model takes.
        """
        held, stream = self._bound(inputs), _torch().cuda.current_stream()
        self._execute(stream)
        stream.synchronize()
        return {spec.name: held[spec.name].cpu().numpy() for spec in self._model.outputs}

    def device_times_ms(self, inputs: Arrays, runs: int) -> tuple[float, ...]:
        """Milliseconds of each of some runs by CUDA events, one run before them, without copies to the device and back.

        Raises:
            InputError: An input is missing, or is not what the model takes.
        """
        held, torch = self._bound(inputs), _torch()
        stream = torch.cuda.current_stream()
        self._execute(stream)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
        events[0].record(stream)
        for event in events[1:]:
            self._execute(stream)
            event.record(stream)
        stream.synchronize()
        del held  # until here, the engine read and wrote there
        return tuple(float(begin.elapsed_time(end)) for begin, end in pairwise(events))

    def _bound(self, inputs: Arrays) -> dict[str, Any]:
        """Inputs and room for outputs on the device, by name, with their addresses told to the engine."""
        if self._context is None:
            message = f"the runner of {self._directory / PLAN} is used outside `with`"
            raise InternalError(message)
        torch = _torch()
        self._require_inputs(inputs)
        held = {name: torch.from_numpy(array).cuda() for name, array in input_arrays(inputs).items()}
        for name, tensor in held.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                what = f"The engine was not built for {name} of shape {list(tensor.shape)}."
                raise InputError(what, "Export again with --dim ranges that hold it.")
        for spec in self._model.outputs:
            shape = tuple(self._context.get_tensor_shape(spec.name))
            held[spec.name] = torch.empty(shape, dtype=getattr(torch, spec.dtype), device="cuda")
        for name, tensor in held.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        return held

    def _execute(self, stream: Any) -> None:
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise UnavailableError(f"The engine {self._directory / PLAN} failed on the device.")

    def _plan(self, trt: Library) -> bytes:
        """The plan, or another one where it does not fit; nothing is written."""
        plan, record = (self._directory / PLAN).read_bytes(), Record.read(self._directory)
        module = trt.module
        why = misfit(plan[:28], record, module.__name__, module.__version__, device_architecture())
        if not why:
            return plan
        warnings.warn(f"{self._directory / PLAN} is built anew: {why}.", stacklevel=4)
        return build(trt, self._directory / MODEL, record.profile, self._options).plan

    def _require_inputs(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        for spec in self._model.inputs:
            if spec.name not in inputs:
                raise InputError(f"The input {spec.name!r} is missing.", f"The model takes {spec}.")
            array = inputs[spec.name]
            if problem := spec.mismatch(array.dtype.name, array.shape):
                raise InputError(f"The input {spec.name!r} {problem}.")


def _torch() -> Any:
    """Torch with CUDA.

    Raises:
        UnavailableError: It is not installed, or is a build for the CPU.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise UnavailableError("torch is not installed, and runs engines.", "Install PyTorch with CUDA.") from error
    if not torch.cuda.is_available():
        raise UnavailableError("torch has no CUDA here, and runs engines.", "Install PyTorch's CUDA build.")
    return torch
