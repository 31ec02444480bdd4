"""ONNX Runtime on an NVIDIA GPU: its own CUDA kernels, or engines that its TensorRT provider builds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qdeploy import graph as questions
from qdeploy.affine import IntegerType
from qdeploy.backend import Artifact, Availability, Backend, Layer, Runner, no_progress
from qdeploy.device import cuda_devices
from qdeploy.errors import InputError, UnavailableError
from qdeploy.model import FloatModel, QuantizedModel, copy_model
from qdeploy.scheme import Condition, Form, OpRule, PerChannel, QuantContract, Scheme
from qdeploy.session import SessionRunner

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime

CURE = "pip uninstall onnxruntime, then pip install 'qdeploy[gpu]', on a machine with an NVIDIA GPU and CUDA"

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"

ACTIVATION = Scheme(IntegerType(8, signed=True), symmetric=True)
"""TensorRT takes no zero points."""


def _weight(axis: int) -> Scheme:
    return Scheme(IntegerType(8, signed=True, narrow=True), symmetric=True, granularity=PerChannel(axis))


_ENGINE = "TensorRT reads INT8 off the QDQ pairs of its part of the graph."
_KEEP = "Leave it float: TensorRT runs it in one kernel with its neighbours."

INT8_RULES = (
    OpRule("Conv", (Condition.DEPTHWISE,), reason="TensorRT pads each of its channels to four.", cure=_KEEP),
    OpRule(
        "Conv", (Condition.CONSTANT_WEIGHT, Condition.CONSTANT_BIAS), {0: ACTIVATION, 1: _weight(0)}, reason=_ENGINE
    ),
    OpRule(
        "Gemm",
        (Condition.CONSTANT_MATRIX, Condition.PLAIN_GEMM, Condition.TRANSPOSED_B),
        {0: ACTIVATION, 1: _weight(0)},
        reason=_ENGINE,
    ),
    OpRule(
        "Gemm",
        (Condition.CONSTANT_MATRIX, Condition.PLAIN_GEMM),
        {0: ACTIVATION, 1: _weight(1)},
        reason=_ENGINE,
    ),
    OpRule("MatMul", (Condition.CONSTANT_MATRIX,), {0: ACTIVATION, 1: _weight(1)}, reason=_ENGINE),
)

CONTRACTS = {
    "fp16": (Form.FLOAT16, (), "FP16 is what ORT's CUDA kernels are made for; nothing of it was measured here."),
    "int8": (Form.QDQ, INT8_RULES, "Which kernels TensorRT chose inside its part of the graph, ORT does not tell."),
    "fp32": (Form.FLOAT, (), ""),
}
"""Form, rules and advice of each precision."""


@dataclass(frozen=True)
class Options:
    """How ONNX Runtime runs the model.

    Attributes:
        provider: Whose kernels come first: ORT's own for CUDA, or TensorRT's; the rest falls to the next.
        device: Which GPU, counted from 0.
    """

    provider: Literal["cuda", "tensorrt"] = "cuda"
    device: int = 0


class OrtCuda(Backend):
    """ONNX Runtime's CUDA and TensorRT providers."""

    name = "ort-cuda"
    summary = "ONNX Runtime on NVIDIA GPUs: servers, workstations"
    precisions = tuple(CONTRACTS)
    options_type = Options
    tolerance_lsb = 6.0

    def availability(self) -> Availability:
        """Whether onnxruntime-gpu is installed and a driver offers a device."""
        try:
            version("onnxruntime-gpu")
        except PackageNotFoundError:
            return Availability(ok=False, reason="onnxruntime-gpu is not installed", cure=CURE)
        if not cuda_devices():
            return Availability(ok=False, reason="no CUDA device is at hand", cure=CURE)
        return Availability(ok=True)

    def contract(self, precision: str, options: Options) -> QuantContract:  # noqa: ARG002 - no option changes the rules
        """Symmetric int8 without zero points, float biases, QDQ pairs before operators only."""
        form, rules, advice = CONTRACTS[precision]
        return QuantContract(self.name, precision, (13, 25), "float", "inputs", rules, form, advice=advice)

    def check(self, model: FloatModel, precision: str, options: Options) -> None:  # noqa: ARG002 - any model will do
        """Refuse int8 where no kernel computes in it."""
        if precision == "int8" and options.provider == "cuda":
            what = (
                "ort-cuda:int8 needs the TensorRT provider: ORT's CUDA kernels have no integer convolution or product."
            )
            raise InputError(what, "Add --set ort-cuda.provider=tensorrt, or take fp16.")

    def lower(
        self,
        model: FloatModel | QuantizedModel,
        precision: str,
        directory: Path,
        options: Options,
        on_progress: Callable[[float], None] = no_progress,
    ) -> Artifact:
        """Copy the model, load it on the GPU, and ask ORT which provider took each node."""
        main = copy_model(model.path, directory)
        session = _open(main, options)
        origin = model.float_model if isinstance(model, QuantizedModel) else model
        on_progress(1.0)
        found = layers(questions.load_graph(origin.path), _assigned(session), precision)
        return Artifact(self.name, precision, directory, main.name, found)

    def open(self, artifact: Artifact, options: Options) -> Runner:
        """A session on the artifact's model."""
        return SessionRunner(artifact.path, opener=partial(_open, artifact.path, options))


def layers(graph: ir.Model, providers: dict[str, str], precision: str) -> tuple[Layer, ...]:
    """Which provider took each node of the float model, as the layer's name.

    What TensorRT computes in is decided within its engine, and what ORT's graph rewrites have absorbed has no name any
    more: both are "unknown". The others compute in the type that the graph holds.

    Args:
        graph: The float model.
        providers: Provider by node name.
        precision: What was built.
    """
    kind = "fp16" if precision == "fp16" else "fp32"
    found = []
    for node in graph.graph.all_nodes():
        if not any(questions.is_real(value) for value in node.outputs):
            continue
        provider = providers.get(str(node.name), "")
        own = bool(provider) and provider != TENSORRT
        weights = kind if own and questions.has_weight(node) else None
        types = (kind,) if own else ()
        found.append(Layer(str(node.name), node.op_type, provider, types, weights, types, kind if own else "unknown"))
    return tuple(found)


def _assigned(session: onnxruntime.InferenceSession) -> dict[str, str]:
    """The provider that runs each node, by its name, as far as this ORT tells (1.24 and newer)."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    parts = session.get_provider_graph_assignment_info()
    return {node.name: part.ep_name for part in parts for node in part.get_nodes()}


def _open(path: Path, options: Options) -> onnxruntime.InferenceSession:
    """A session on the GPU.

    Raises:
        UnavailableError: ORT offers no such provider here.
        InputError: ORT cannot load the model.
    """
    import onnxruntime as ort

    wanted = [TENSORRT, CUDA] if options.provider == "tensorrt" else [CUDA]
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # what is an error is raised, too
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    providers = [(name, {"device_id": str(options.device)}) for name in wanted]
    if wanted[0] not in ort.get_available_providers():
        raise UnavailableError(f"This onnxruntime has no {wanted[0]}.", f"To get it: {CURE}.")
    try:
        session = ort.InferenceSession(str(path), settings, providers=[*providers, "CPUExecutionProvider"])
    except Exception as error:  # ORT raises a different class for each of its status codes
        raise InputError(f"ONNX Runtime cannot load {path.name}: {str(error).strip()}") from error
    if wanted[0] not in session.get_providers():  # ORT goes on without a provider whose libraries it cannot load
        raise UnavailableError(
            f"{wanted[0]} could not be loaded.", "Install the CUDA, cuDNN or TensorRT that it needs."
        )
    return session
