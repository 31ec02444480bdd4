"""What TensorRT takes, as data. The reasons were measured with TensorRT-RTX 1.7 unless they say otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qdeploy.affine import IntegerType
from qdeploy.errors import InputError, UnavailableError
from qdeploy.graph import holds
from qdeploy.registry import suggestion
from qdeploy.scheme import Condition, Form, OpRule, PerBlock, PerChannel, QuantContract, Scheme

if TYPE_CHECKING:
    import onnx_ir as ir

NAME = "tensorrt"

ARCHITECTURES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""The compute capabilities that TensorRT-RTX builds for."""

BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Options:
    """How engines are built.

    Attributes:
        arch: For TensorRT-RTX, the GPUs that the engine shall run on, by compute capability; empty for all that the
            builder takes by default. TensorRT itself builds for the GPU of the machine.
        workspace_mib: Most scratch memory of an operator in MiB; 0 for the builder's default.
        block_size: Weights that share a scale at int4: 16, 32, 64 or 128.
    """

    arch: tuple[str, ...] = ()
    workspace_mib: int = 0
    block_size: int = 32

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
        if self.block_size not in BLOCK_SIZES:
            takes = ", ".join(map(str, BLOCK_SIZES))
            raise InputError(f"tensorrt.block_size cannot be {self.block_size}.", f"It takes: {takes}.")


ACTIVATION = Scheme(IntegerType(8, signed=True), symmetric=True)
"""−128 to 127 with zero point 0: any other is refused while parsing."""

CONSTANT, WITH_BIAS, MATRIX = Condition.CONSTANT_WEIGHT, Condition.CONSTANT_BIAS, Condition.CONSTANT_MATRIX


def _weight(axis: int) -> Scheme:
    return Scheme(IntegerType(8, signed=True, narrow=True), symmetric=True, granularity=PerChannel(axis))


_KEEP = "Leave it float; quantized, it would cost more than it saves."
_WHOLE = Scheme(IntegerType(8, signed=True, narrow=True), symmetric=True)

_SPLIT = (
    "INT8 gemm with one scale for the whole weight: before attention, the builder cuts a weight of queries, keys and "
    "values into its parts, and runs one with a scale for each output feature silently in float."
)
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
        (MATRIX, WITH_BIAS, Condition.PLAIN_GEMM, Condition.SPLIT_RESULT),
        {0: ACTIVATION, 1: _WHOLE},
        reason=_SPLIT,
    ),
    OpRule(
        "Gemm",
        (MATRIX, WITH_BIAS, Condition.PLAIN_GEMM, Condition.TRANSPOSED_B),
        {0: ACTIVATION, 1: _weight(0)},
        reason=_GEMM,
    ),
    OpRule("Gemm", (MATRIX, WITH_BIAS, Condition.PLAIN_GEMM), {0: ACTIVATION, 1: _weight(1)}, reason=_GEMM),
    OpRule("Gemm", reason="Its weight or bias is computed, or it has factors.", cure=_KEEP),
    OpRule("MatMul", (CONSTANT, Condition.SPLIT_RESULT), {0: ACTIVATION, 1: _WHOLE}, reason=_SPLIT),
    OpRule("MatMul", (MATRIX,), {0: ACTIVATION, 1: _weight(1)}, reason=_GEMM),
    OpRule("MatMul", (CONSTANT,), {0: ACTIVATION, 1: _weight(-1)}, reason=_GEMM),
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

_UNPACKED = "The weight stays INT4 in the engine; the kernel that multiplies unpacks it to float."
_WHOLE_BLOCKS = (
    "The builder divides inputs by scales, so that no block can be short; a weight of one block, or of an odd number "
    "of outputs, it unpacks on every run, in a kernel of its own."
)
_SMALLER_BLOCKS = "Where inputs are few, choose smaller blocks: --set tensorrt.block_size=16."
_NO_BLOCKS = "Blocks lie along one of a weight's last two axes, and neither holds the input channels of its kernels."


def _int4_rules(size: int) -> tuple[OpRule, ...]:
    def blocks(axis: int) -> Scheme:
        return Scheme(IntegerType(4, signed=True, narrow=True), symmetric=True, granularity=PerBlock(size, axis))

    plain, even = (MATRIX, WITH_BIAS, Condition.PLAIN_GEMM), Condition.EVEN_OUTPUTS
    whole = Condition[f"BLOCKS_OF_{size}"]
    return (
        OpRule("MatMul", (MATRIX, even, whole), {1: blocks(0)}, reason=_UNPACKED),
        OpRule("MatMul", (MATRIX,), reason=_WHOLE_BLOCKS, cure=_SMALLER_BLOCKS),
        OpRule("MatMul", reason="A product of two activations has no weight to store.", cure=_KEEP),
        OpRule("Gemm", (*plain, even, whole, Condition.TRANSPOSED_B), {1: blocks(1)}, reason=_UNPACKED),
        OpRule("Gemm", (*plain, even, whole), {1: blocks(0)}, reason=_UNPACKED),
        OpRule("Gemm", plain, reason=_WHOLE_BLOCKS, cure=_SMALLER_BLOCKS),
        OpRule("Gemm", reason="Its weight or bias is computed, or it has factors.", cure=_KEEP),
        OpRule(
            "Gather",
            (Condition.ROWS_OF_MATRIX, whole),
            {0: blocks(1)},
            reason="The table stays INT4 in the engine; rows become floats as they are looked up.",
        ),
        OpRule("Gather", (Condition.ROWS_OF_MATRIX,), reason=_WHOLE_BLOCKS, cure=_SMALLER_BLOCKS),
        OpRule("Gather", reason="What is looked up are no rows of a constant matrix.", cure=_KEEP),
        *(OpRule(op, reason=_NO_BLOCKS, cure="Leave it float, or choose int8.") for op in ("Conv", "ConvTranspose")),
    )


_INT4_ADVICE = (
    "INT4 makes the weights of products and tables a sixth of the size; activations stay float32. Not measured: any "
    "latency, as no GPU was at hand; it can pay where a few rows are multiplied, and reading weights takes the time."
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
    "int4": (Form.WEIGHT_QDQ, (21, 25), _int4_rules(32), _INT4_ADVICE),
    "fp32": (Form.FLOAT, (13, 25), (), ""),
}
"""Form, opsets (float16 scales came with 19, blocks with 21), rules and advice of each precision."""


TURING = "sm75"

PRODUCTS = frozenset({"MatMul", "Gemm", "Einsum", "LSTM", "GRU", "RNN"})
"""Operators that become matrix products."""


def check_architectures(graph: ir.Model, precision: str, options: Options) -> None:
    """Refuse what an architecture cannot run, before anything is calibrated: Turing has neither of two kernels.

    A plan for several architectures has the same kernels for all, so that one without them decides for the others.

    Raises:
        UnavailableError: TensorRT-RTX cannot build it for sm75, or would run its convolutions in float.
    """
    if TURING not in options.arch:
        return
    form, nodes = CONTRACTS[precision][0], list(graph.graph.all_nodes())
    lacking = {}
    if form not in (Form.FLOAT16, Form.QDQ_FLOAT16):
        lacking["products in float32"] = [node for node in nodes if node.op_type in PRODUCTS]
    if form in (Form.QDQ, Form.QDQ_FLOAT16):
        lacking["INT8 convolutions"] = [node for node in nodes if _is_int8_convolution(node)]
    for kernels, found in lacking.items():
        if found:
            others = f" and {len(found) - 1} more" if len(found) > 1 else ""
            what = f"TensorRT-RTX has no {kernels} for sm75, and {precision} needs them: {found[0].name}{others}."
            raise UnavailableError(what, "Choose fp16 for sm75, or leave it out of tensorrt.arch.")


def _is_int8_convolution(node: ir.Node) -> bool:
    rule = next(
        (r for r in INT8_RULES if r.op_type == node.op_type and all(holds(c, node, set()) for c in r.when)), None
    )
    return node.op_type == "Conv" and rule is not None and rule.quantizes


def contract(precision: str, options: Options) -> QuantContract:
    """The rules of a precision."""
    form, opsets, rules, advice = CONTRACTS[precision]
    if form is Form.WEIGHT_QDQ:
        rules = _int4_rules(options.block_size)
    return QuantContract(NAME, precision, opsets, "float", "inputs", rules, form, strict=True, advice=advice)
