"""ONNX Runtime on the CPU: static INT8 as QDQ graphs, which ORT turns into its integer kernels when it loads them."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.affine import IntegerType
from qdeploy.backend import Arrays, Artifact, Availability, Backend, Evidence, Layer, Runner, input_arrays
from qdeploy.model import FloatModel, QuantizedModel, model_files
from qdeploy.scheme import Condition, OpRule, PerChannel, QuantContract, Scheme
from qdeploy.session import GraphLevel, open_session

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime

ACTIVATION = Scheme(IntegerType(8, signed=False), symmetric=False)
"""Unsigned: ORT has no x86 kernel for signed activations in MatMul, and convolves them at half the speed."""

CONSTANT, BETWEEN, LAST = Condition.CONSTANT_WEIGHT, Condition.BETWEEN_QUANTIZED, Condition.GRAPH_OUTPUT


def _weight(axis: int) -> Scheme:
    return Scheme(IntegerType(8, signed=True, narrow=True), symmetric=True, granularity=PerChannel(axis))


def _gemm(*when: Condition, axis: int, output: Scheme | None, reason: str) -> OpRule:
    return OpRule("Gemm", (CONSTANT, *when), {0: ACTIVATION, 1: _weight(axis)}, output, reason=reason)


_GEMM = "QGemm; one scale for each output feature."
_LAST_GEMM = "QGemm with float output: nothing reads the result as integers, so it is not rounded again."
_JOIN = "Runs in integers when its inputs are integers already; between float operators it would only add rounding."
_MOVE = "Moves values without computing: stays in integers, with its input's scale."
_KEEP = "Leave it float; if it decides the latency, choose a target that has an integer kernel for it."

INT8_RULES = (
    OpRule(
        "Conv",
        (CONSTANT,),
        {0: ACTIVATION, 1: _weight(0)},
        ACTIVATION,
        reason="QLinearConv; one scale for each output channel keeps 97 % instead of 84 % of decisions on EfficientNet-Lite0.",
    ),
    OpRule("ConvTranspose", reason="ORT has no integer ConvTranspose on the CPU.", cure=_KEEP),
    _gemm(Condition.TRANSPOSED_B, LAST, axis=0, output=None, reason=_LAST_GEMM),
    _gemm(LAST, axis=1, output=None, reason=_LAST_GEMM),
    _gemm(Condition.TRANSPOSED_B, axis=0, output=ACTIVATION, reason=_GEMM),
    _gemm(axis=1, output=ACTIVATION, reason=_GEMM),
    OpRule(
        "MatMul",
        (CONSTANT,),
        {0: ACTIVATION, 1: _weight(-1)},
        reason="MatMulIntegerToFloat: integer product, float result, which the following operators want.",
    ),
    OpRule("MatMul", reason="A product of two activations gains too little to pay for quantizing both.", cure=_KEEP),
    *(OpRule(op, (BETWEEN,), {0: ACTIVATION, 1: ACTIVATION}, ACTIVATION, reason=_JOIN) for op in ("Add", "Mul")),
    OpRule("Concat", (BETWEEN,), {}, ACTIVATION, reason=_JOIN),
    *(
        OpRule(op, (BETWEEN,), {0: ACTIVATION}, ACTIVATION, reason=_JOIN)
        for op in ("GlobalAveragePool", "AveragePool", "ReduceMean", "LeakyRelu", "Sigmoid")
    ),
    *(
        OpRule(op, moves_values=True, reason=_MOVE)
        for op in ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Resize")
    ),
    OpRule("Softmax", reason="Its output spans many orders of magnitude, and it costs little.", cure=_KEEP),
    OpRule("LayerNormalization", reason="ORT has no integer LayerNormalization on the CPU.", cure=_KEEP),
)


@dataclass(frozen=True)
class Options:
    """How ONNX Runtime runs the model.

    Attributes:
        threads: Threads within an operator; 0 for one a core.
        graph_level: How far ORT may rewrite the graph.
    """

    threads: int = 0
    graph_level: GraphLevel = "all"


class OrtCpu(Backend):
    """ONNX Runtime's CPU provider."""

    name = "ort-cpu"
    summary = "ONNX Runtime on the CPU: servers, desktops, edge"
    precisions = ("int8", "fp32")
    options_type = Options
    tolerance_lsb = 6.0

    def availability(self) -> Availability:
        """Whether onnxruntime is installed."""
        from importlib.util import find_spec

        if find_spec("onnxruntime") is None:
            return Availability(ok=False, reason="onnxruntime is not installed", cure="pip install 'qdeploy[cpu]'")
        return Availability(ok=True)

    def contract(self, precision: str, options: Options) -> QuantContract:  # noqa: ARG002 - no option changes the rules
        """Unsigned asymmetric activations, signed symmetric weights, int32 biases; float at fp32."""
        rules = INT8_RULES if precision == "int8" else ()
        return QuantContract(self.name, precision, (13, 25), "int32", "inputs-and-outputs", rules)

    def lower(self, model: FloatModel | QuantizedModel, precision: str, directory: Path, options: Options) -> Artifact:
        """Copy the model, load it, and read from the graph that ORT made of it what each node became."""
        for source in model_files(model.path):
            shutil.copyfile(source, directory / source.name)
        main = directory / model.path.name
        with tempfile.TemporaryDirectory(prefix="qdeploy-") as scratch:
            optimized = Path(scratch) / "optimized.onnx"
            open_session(main, threads=options.threads, graph_level=options.graph_level, optimized=optimized)
            layers = _layers(questions.load_graph(main), questions.load_graph(optimized))
        return Artifact(self.name, precision, directory, main.name, layers)

    def open(self, artifact: Artifact, options: Options) -> Runner:
        """A session on the artifact's model."""
        return OrtRunner(artifact.path, options)


class OrtRunner(Runner):
    """An ONNX Runtime session."""

    evidence = Evidence.EXECUTED

    def __init__(self, path: Path, options: Options) -> None:
        self._path = path
        self._options = options
        self._session: onnxruntime.InferenceSession | None = None

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name."""
        if self._session is None:
            message = "a runner is used inside `with` only"
            raise RuntimeError(message)
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, input_arrays(inputs)), strict=True))

    def __enter__(self) -> Self:
        self._session = open_session(self._path, threads=self._options.threads, graph_level=self._options.graph_level)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None
