"""How tensors may be quantized, as data: schemes, operator rules, and a target's contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal

from qdeploy.affine import IntegerType


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""

    def __str__(self) -> str:
        return "per-tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index along `axis` (negative counts from the end): shape [shape[axis]]."""

    axis: int

    def __str__(self) -> str:
        return f"per-channel (axis {self.axis})"


@dataclass(frozen=True)
class PerBlock:
    """One scale for each `size` consecutive values along `axis`."""

    size: int
    axis: int

    def __str__(self) -> str:
        return f"blocks of {self.size} (axis {self.axis})"


Granularity = PerTensor | PerChannel | PerBlock


@dataclass(frozen=True)
class Scheme:
    """How one tensor is quantized.

    Attributes:
        integer: The stored integers (bits, sign, narrow).
        symmetric: Zero point fixed at the middle of the grid (0 for signed types).
        granularity: How many values share a scale.
    """

    integer: IntegerType
    symmetric: bool
    granularity: Granularity = field(default_factory=PerTensor)

    def __str__(self) -> str:
        return f"{self.integer} {'symmetric' if self.symmetric else 'asymmetric'} {self.granularity}"


class Condition(StrEnum):
    """A named question about a node, answered by `qdeploy.graph.holds`."""

    CONSTANT_WEIGHT = "with a constant weight"
    CONSTANT_MATRIX = "with a constant weight of two dimensions"
    EVEN_OUTPUTS = "with an even number of outputs"
    BLOCKS_OF_16 = "with a constant of several whole blocks of 16 inputs"
    BLOCKS_OF_32 = "with a constant of several whole blocks of 32 inputs"
    BLOCKS_OF_64 = "with a constant of several whole blocks of 64 inputs"
    BLOCKS_OF_128 = "with a constant of several whole blocks of 128 inputs"
    CONSTANT_TABLE = "from a constant table of real values"
    ROWS_OF_MATRIX = "it takes rows of a constant matrix of real values"
    CONSTANT_RECURRENCE = "with constant input and recurrence weights"
    DEPTHWISE = "depthwise (one input channel a group)"
    TRANSPOSED_B = "with a constant weight and transB=1"
    CONSTANT_BIAS = "with a constant bias or none"
    CONSTANT_BOUND = "of a computed operand and a constant that is not negative"
    NEAREST = "it repeats the nearest value (mode=nearest)"
    BETWEEN_QUANTIZED = "every input comes from a quantized operator"
    GRAPH_OUTPUT = "it writes a graph output that nothing else reads"
    SPLIT_RESULT = "its result is read in parts (queries, keys and values)"
    PLAIN_GEMM = "without transA or factors (alpha=1, beta=1)"
    SEQUENCE_FIRST = "sequences lie along axis 0 (layout=0)"


class Form(StrEnum):
    """What a target is given: how its quantization is written into the ONNX graph."""

    FLOAT = "float"
    """The float graph; what is quantized, the target quantizes itself."""
    QDQ = "qdq"
    """Float operators between QuantizeLinear and DequantizeLinear, with ranges from calibration."""
    DYNAMIC = "dynamic"
    """Integer weights; activations are quantized at run time, with the range that each tensor turns out to have."""
    WEIGHTS = "weights"
    """Integer weights; activations stay float."""
    WEIGHT_QDQ = "weight-qdq"
    """Integer weights behind DequantizeLinear; activations stay float."""
    HALF = "half"
    """Weights in float16, each behind a Cast to float32."""
    FLOAT16 = "float16"
    """The float graph in float16 throughout; inputs and outputs keep their types."""
    QDQ_FLOAT16 = "qdq-float16"
    """As QDQ, with everything that is not an integer in float16, the scales too."""


@dataclass(frozen=True)
class OpRule:
    """What a target takes for one operator, under one condition.

    Attributes:
        op_type: ONNX operator of the default domain.
        when: The conditions under which the rule applies, all of them.
        inputs: Scheme by input index; None or a missing index leaves that input float.
        output: Scheme of the output (after a fused activation); None leaves it float.
        moves_values: The operator moves values without computing: its output shares the scale of input 0, and it is
            quantized just when input 0 already is. Constants among `inputs` share that scale, too.
        reason: Why the rule is so, with the measurement or document behind it.
        cure: What a user can do who needs something else.
    """

    op_type: str
    when: tuple[Condition, ...] = ()
    inputs: Mapping[int, Scheme | None] = field(default_factory=dict)
    output: Scheme | None = None
    moves_values: bool = False
    reason: str = ""
    cure: str = ""

    @property
    def quantizes(self) -> bool:
        """Whether the rule makes anything of the node an integer."""
        return self.moves_values or self.output is not None or any(self.inputs.values())


@dataclass(frozen=True)
class QuantContract:
    """A target's rules for one precision.

    Attributes:
        target: Backend name.
        precision: For example "int8".
        opsets: Lowest and highest ONNX opset the target takes.
        bias: How the bias of a quantized operator is stored.
        placement: Where QDQ pairs stand: before quantized operators only, or after them too.
        rules: In order; the first that matches a node wins. A node that none matches stays float.
        form: What the target is given.
        strict: The target refuses QDQ pairs that no rule describes, or computes in float behind them without a word,
            and takes a DequantizeLinear past operators that only move values; otherwise it runs pairs as they stand.
        advice: What to know before choosing this precision: what it is worth, and what of that was not measured.
    """

    target: str
    precision: str
    opsets: tuple[int, int]
    bias: Literal["int32", "float"]
    placement: Literal["inputs", "inputs-and-outputs"]
    rules: tuple[OpRule, ...] = ()
    form: Form = Form.QDQ
    strict: bool = False
    advice: str = ""

    def with_per_tensor_weights(self) -> QuantContract:
        """The same contract with one scale for each weight tensor; where kernels take blocks only, blocks stay."""

        def flat(scheme: Scheme | None) -> Scheme | None:
            channels = scheme is not None and isinstance(scheme.granularity, PerChannel)
            return replace(scheme, granularity=PerTensor()) if scheme and channels else scheme

        rules = tuple(replace(r, inputs={i: flat(s) for i, s in r.inputs.items()}) for r in self.rules)
        return replace(self, rules=rules)
