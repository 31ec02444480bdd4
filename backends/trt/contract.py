"""What TensorRT takes, as data. The reasons were measured with TensorRT-RTX 1.7 unless they say otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from qdeploy.affine import IntegerType
from qdeploy.errors import InputError
from qdeploy.registry import suggestion
from qdeploy.scheme import Condition, Form, OpRule, PerChannel, QuantContract, Scheme

NAME = "tensorrt"

ARCHITECTURES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""The compute capabilities that TensorRT-RTX builds for."""


@dataclass(frozen=True)
class Options:
    """How engines are built.

    Attributes:
        arch: For TensorRT-RTX, the GPUs that the engine shall run on, by compute capability; empty for all that the
            builder takes by default. TensorRT itself builds for the GPU of the machine.
        workspace_mib: Most scratch memory of an operator in MiB; 0 for the builder's default.
    """

    arch: tuple[str, ...] = ()
    workspace_mib: int = 0

    def __post_init__(self) -> None:
        for name in self.arch:
            if name == "sm90":
                what = "tensorrt.arch cannot be 'sm90': TensorRT-RTX has no engines for H100 and H200."
                raise InputError(what, "Install tensorrt on a machine with such a GPU, and leave out tensorrt.arch.")
            if name not in ARCHITECTURES:
                raise InputError(f"tensorrt.arch cannot be {name!r}.", suggestion(name, list(ARCHITECTURES)))
            if self.arch.count(name) > 1:
                raise InputError(f"tensorrt.arch names {name!r} twice.", "Name it once.")
        if self.workspace_mib < 0:
            raise InputError(f"tensorrt.workspace_mib cannot be {self.workspace_mib}.", "Give MiB, or 0 for no limit.")


ACTIVATION = Scheme(IntegerType(8, signed=True), symmetric=True)
"""−128 to 127 with zero point 0: any other is refused while parsing."""

CONSTANT, WITH_BIAS, MATRIX = Condition.CONSTANT_WEIGHT, Condition.CONSTANT_BIAS, Condition.CONSTANT_MATRIX


def _weight(axis: int) -> Scheme:
    return Scheme(IntegerType(8, signed=True, narrow=True), symmetric=True, granularity=PerChannel(axis))


_KEEP = "Leave it float; quantized, it would cost more than it saves."
_GEMM = "INT8 gemm; with one scale for each output feature. Along the other axis it silently runs in float."

INT8_RULES = (
    OpRule(
        "Conv",
        (Condition.DEPTHWISE,),
        reason="INT8 pads each of its channels to four, and moves four times the values.",
        cure=_KEEP,
    ),
    OpRule(
        "Conv",
        (CONSTANT, WITH_BIAS),
        {0: ACTIVATION, 1: _weight(0)},
        reason="INT8 convolution; with scales along axis 1 it silently runs in float.",
    ),
    OpRule("Conv", reason="Its weight or bias is computed, which no INT8 kernel takes.", cure=_KEEP),
    OpRule("ConvTranspose", reason="It silently runs in float, and unpacks its weight on every run.", cure=_KEEP),
    OpRule(
        "Gemm",
        (MATRIX, WITH_BIAS, Condition.PLAIN_GEMM, Condition.TRANSPOSED_B),
        {0: ACTIVATION, 1: _weight(0)},
        reason=_GEMM,
    ),
    OpRule("Gemm", (MATRIX, WITH_BIAS, Condition.PLAIN_GEMM), {0: ACTIVATION, 1: _weight(1)}, reason=_GEMM),
    OpRule("Gemm", reason="Its weight or bias is computed, or it has factors.", cure=_KEEP),
    OpRule("MatMul", (MATRIX,), {0: ACTIVATION, 1: _weight(1)}, reason=_GEMM),
    OpRule("MatMul", reason="A product of two activations gains too little to pay for quantizing both.", cure=_KEEP),
    OpRule(
        "MaxPool",
        reason="Needs no QDQ pair: before an INT8 operator, the builder itself moves the rounding in front of it.",
        cure="Leave it float in the graph; layers.json says what it became.",
    ),
    OpRule(
        "Add",
        reason="In a residual sum the skipped branch is INT8 already; the other would be rounded once more.",
        cure=_KEEP,
    ),
    *(
        OpRule(
            op,
            reason="It computes in float in one kernel with its neighbours, which quantize for themselves.",
            cure=_KEEP,
        )
        for op in ("Relu", "Clip", "Mul", "Div", "Concat", "Softmax", "LayerNormalization", "Gelu", "GlobalAveragePool")
    ),
)

_FP16_ADVICE = "FP16 halves what layers and plan hold, on every GPU; no latency was measured, as no GPU was at hand."
_INT8_ADVICE = (
    "INT8 cuts weights to a quarter. On TensorRT-RTX, INT8 convolutions write float32 and requantize in a kernel of "
    "their own: the layers of a ResNet-50 move as many bytes as FP32's, twice those of FP16, so that fp16 is the "
    "first to try for speed. Not measured: any latency, and TensorRT itself; compare precisions on the device."
)

CONTRACTS = {
    "int8": (Form.QDQ, (13, 25), INT8_RULES, _INT8_ADVICE),
    "fp16": (Form.FLOAT16, (13, 25), (), _FP16_ADVICE),
    "int8-fp16": (Form.QDQ_FLOAT16, (19, 25), INT8_RULES, _INT8_ADVICE),
    "fp32": (Form.FLOAT, (13, 25), (), ""),
}
"""Form, opsets (float16 scales came with 19), rules and advice of each precision."""


def contract(precision: str) -> QuantContract:
    """The rules of a precision."""
    form, opsets, rules, advice = CONTRACTS[precision]
    return QuantContract(NAME, precision, opsets, "float", "inputs", rules, form, strict=True, advice=advice)
