"""What Core ML takes, as data: the rules for int8 weights and activations, and for weights alone."""

from __future__ import annotations

from qdeploy.affine import IntegerType
from qdeploy.scheme import Condition, Form, OpRule, PerChannel, QuantContract, Scheme

ACTIVATION = Scheme(IntegerType(8, signed=False), symmetric=False)
"""MIL's quantize takes int8 and uint8, with a zero point; after a ReLU, uint8 has twice the resolution of int8."""

CONSTANT, WITH_BIAS, TABLE = Condition.CONSTANT_WEIGHT, Condition.CONSTANT_BIAS, Condition.CONSTANT_TABLE
BETWEEN, LAST = Condition.BETWEEN_QUANTIZED, Condition.GRAPH_OUTPUT


def weight(axis: int) -> Scheme:
    """int8 with a scale for each output channel."""
    return Scheme(IntegerType(8, signed=True, narrow=True), symmetric=True, granularity=PerChannel(axis))


_NEURAL = (
    "int8 by int8 on the Neural Engine of A17 Pro and M4 and later (coremltools, Quantization: Performance); "
    "elsewhere its weights are smaller and its speed is that of floats."
)
_LAST = "Its output stays float: nothing reads it as integers, so it is not rounded again."
_JOIN = "Stays in integers when its inputs are integers already; between float operators it would only add rounding."
_MOVE = "Moves values without computing: stays in integers, with its input's scale."
_MEAN = "An average lies between the values it is made of, so it keeps their scale."
_TABLE = "constexpr_affine_dequantize holds the table as int8; a scale for each row keeps rare words exact."
_COMPUTED = "constexpr_affine_dequantize holds constants only."
_KEEP = "Leave it float, or make its weight a constant of the model."
_PRODUCT = "A product of two activations gains too little to pay for quantizing both."


_SMALLER = "constexpr_affine_dequantize, from iOS 16: a quarter of the size; it computes in float."

RECURRENT = ("LSTM", "GRU")
"""Operators of which the weights alone become integers: a sequence would be rounded at every step."""

RECURRENT_RULES = (
    *(OpRule(op, (Condition.CONSTANT_RECURRENCE,), {1: weight(1), 2: weight(1)}, reason=_SMALLER) for op in RECURRENT),
    *(OpRule(op, reason=_COMPUTED, cure=_KEEP) for op in RECURRENT),
)


def _gemm(*when: Condition, axis: int, output: Scheme | None, reason: str) -> OpRule:
    return OpRule("Gemm", (CONSTANT, WITH_BIAS, *when), {0: ACTIVATION, 1: weight(axis)}, output, reason=reason)


INT8_RULES = (
    OpRule("Conv", (CONSTANT, WITH_BIAS), {0: ACTIVATION, 1: weight(0)}, ACTIVATION, reason=_NEURAL),
    OpRule("Conv", reason=_COMPUTED, cure=_KEEP),
    OpRule("ConvTranspose", (CONSTANT, WITH_BIAS), {0: ACTIVATION, 1: weight(1)}, ACTIVATION, reason=_NEURAL),
    OpRule("ConvTranspose", reason=_COMPUTED, cure=_KEEP),
    _gemm(Condition.TRANSPOSED_B, LAST, axis=0, output=None, reason=_LAST),
    _gemm(LAST, axis=1, output=None, reason=_LAST),
    _gemm(Condition.TRANSPOSED_B, axis=0, output=ACTIVATION, reason=_NEURAL),
    _gemm(axis=1, output=ACTIVATION, reason=_NEURAL),
    OpRule("Gemm", reason=_COMPUTED, cure=_KEEP),
    OpRule(
        "MatMul",
        (Condition.CONSTANT_MATRIX,),
        {0: ACTIVATION, 1: weight(-1)},
        reason="linear on int8 operands; its float result is what the sums and norms behind it want.",
    ),
    OpRule("MatMul", reason=_PRODUCT, cure=_KEEP),
    OpRule("Gather", (TABLE,), {0: weight(0)}, reason=_TABLE),
    *RECURRENT_RULES,
    *(OpRule(op, (BETWEEN,), {0: ACTIVATION, 1: ACTIVATION}, ACTIVATION, reason=_JOIN) for op in ("Add", "Mul")),
    OpRule("Concat", (BETWEEN,), {}, ACTIVATION, reason=_JOIN),
    *(OpRule(op, (BETWEEN,), {0: ACTIVATION}, ACTIVATION, reason=_JOIN) for op in ("LeakyRelu", "Sigmoid")),
    OpRule("GlobalAveragePool", (BETWEEN,), {0: ACTIVATION}, ACTIVATION, reason=_JOIN),
    OpRule("AveragePool", moves_values=True, reason=_MEAN),
    *(
        OpRule(op, moves_values=True, reason=_MOVE)
        for op in ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")
    ),
    OpRule("Resize", (Condition.NEAREST,), moves_values=True, reason=_MOVE),
)

WEIGHT_RULES = (
    OpRule("Conv", (CONSTANT,), {1: weight(0)}, reason=_SMALLER),
    OpRule("ConvTranspose", (CONSTANT,), {1: weight(1)}, reason=_SMALLER),
    OpRule("Gemm", (CONSTANT, Condition.TRANSPOSED_B), {1: weight(0)}, reason=_SMALLER),
    OpRule("Gemm", (CONSTANT,), {1: weight(1)}, reason=_SMALLER),
    OpRule("MatMul", (Condition.CONSTANT_MATRIX,), {1: weight(-1)}, reason=_SMALLER),
    OpRule("Gather", (TABLE,), {0: weight(0)}, reason=_TABLE),
    *RECURRENT_RULES,
    *(OpRule(op, reason=_COMPUTED, cure=_KEEP) for op in ("Conv", "ConvTranspose", "Gemm", "MatMul")),
)

CONTRACTS = {
    "int8": (Form.QDQ, INT8_RULES),
    "fp16": (Form.FLOAT, ()),
    "int8-weights": (Form.WEIGHT_QDQ, WEIGHT_RULES),
    "fp32": (Form.FLOAT, ()),
}
"""What Core ML is given at each precision, and the rules that it was made under."""

OPSETS = (18, 25)
"""Reductions take their axes as an input from 18 on; 25 is the newest whose operators the table was written for."""


def contract(target: str, precision: str) -> QuantContract:
    """The rules for one precision. A bias is float in MIL; an int32 one of another tool is made float, too."""
    form, rules = CONTRACTS[precision]
    return QuantContract(target, precision, OPSETS, "float", "inputs-and-outputs", rules, form)
