"""ONNX Runtime on the CPU: quantized graphs of ONNX operators, which ORT turns into its kernels when it loads them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import numpy as np

from qdeploy import graph as questions
from qdeploy.affine import IntegerType
from qdeploy.backend import Artifact, Availability, Backend, Layer, Runner, no_progress
from qdeploy.device import VNNI, Device, this_cpu
from qdeploy.errors import InputError
from qdeploy.model import FloatModel, QuantizedModel, copy_model
from qdeploy.scheme import Condition, Form, OpRule, PerBlock, PerChannel, QuantContract, Scheme
from qdeploy.session import GraphLevel, SessionRunner, open_session

if TYPE_CHECKING:
    import onnx_ir as ir

ACTIVATION = Scheme(IntegerType(8, signed=False), symmetric=False)
"""Unsigned, with a zero point: behind a Relu no step of the grid is lost. ORT's kernels take signed ones as fast."""

CONSTANT, WITH_BIAS, MATRIX = Condition.CONSTANT_WEIGHT, Condition.CONSTANT_BIAS, Condition.CONSTANT_MATRIX
BETWEEN, LAST = Condition.BETWEEN_QUANTIZED, Condition.GRAPH_OUTPUT


WEIGHT = IntegerType(8, signed=True, narrow=True)


def _weight(axis: int) -> Scheme:
    return Scheme(WEIGHT, symmetric=True, granularity=PerChannel(axis))


def _gemm(*when: Condition, axis: int, output: Scheme | None, reason: str) -> OpRule:
    return OpRule("Gemm", (CONSTANT, WITH_BIAS, *when), {0: ACTIVATION, 1: _weight(axis)}, output, reason=reason)


_GEMM = "QGemm; one scale for each output feature."
_LAST_GEMM = "QGemm with float output: nothing reads the result as integers, so it is not rounded again."
_JOIN = "Runs in integers when its inputs are integers already; between float operators an Add is half as fast."
_MOVE = "Moves values without computing: stays in integers, with its input's scale."
_KEEP = "Leave it float; if it decides the latency, choose a target that has an integer kernel for it."
_POOL = "Leave it float; a mean over height and width is quantized when it is exported as a global average pool."

_ROWS = (
    "Only the rows that are looked up become floats: half as fast as float (0.02 ms for 128 rows of 384 values), at a "
    "quarter of the size; behind DequantizeLinear, ORT would make floats of all 30,522 rows on every run, in 3 ms."
)
_TABLE_BLOCKS = (
    "GatherBlockQuantized makes floats of the rows that are looked up: 0.4 ms for 128 rows of 384 values, float's 0.01 "
    "ms, at a sixth of the size."
)


def _lookup(table: Scheme, reason: str) -> tuple[OpRule, OpRule]:
    stays = "What is looked up are no rows of a constant matrix."
    rows = OpRule("Gather", (Condition.ROWS_OF_MATRIX,), {0: table}, reason=reason)
    return rows, OpRule("Gather", reason=stays, cure=_KEEP)


INT8_RULES = (
    OpRule(
        "Conv",
        (CONSTANT, WITH_BIAS),
        {0: ACTIVATION, 1: _weight(0)},
        ACTIVATION,
        reason="QLinearConv; a scale for each channel keeps 97 % instead of 84 % of EfficientNet-Lite0's decisions.",
    ),
    OpRule("Conv", reason="ORT has no integer Conv with a computed weight or bias.", cure=_KEEP),
    OpRule("ConvTranspose", reason="ORT has no integer ConvTranspose on the CPU.", cure=_KEEP),
    _gemm(Condition.TRANSPOSED_B, LAST, axis=0, output=None, reason=_LAST_GEMM),
    _gemm(LAST, axis=1, output=None, reason=_LAST_GEMM),
    _gemm(Condition.TRANSPOSED_B, axis=0, output=ACTIVATION, reason=_GEMM),
    _gemm(axis=1, output=ACTIVATION, reason=_GEMM),
    OpRule("Gemm", reason="ORT has no integer Gemm with a computed weight or bias.", cure=_KEEP),
    OpRule(
        "MatMul",
        (CONSTANT,),
        {0: ACTIVATION, 1: _weight(-1)},
        reason=(
            "MatMulIntegerToFloat, 3.1 to 3.6 times as fast as float with its input's quantization (128 tokens, 384 to "
            "1536 features); 2.7 to 3.2 times if its output were quantized too, for float operators to read."
        ),
    ),
    OpRule(
        "MatMul",
        reason="A product of two activations is 0.8 to 0.95 times as fast as in float, with the quantization of both.",
        cure=_KEEP,
    ),
    *(OpRule(op, (BETWEEN,), {0: ACTIVATION, 1: ACTIVATION}, ACTIVATION, reason=_JOIN) for op in ("Add", "Mul")),
    OpRule("Concat", (BETWEEN,), {}, ACTIVATION, reason=_JOIN),
    *(
        OpRule(op, (BETWEEN,), {0: ACTIVATION}, ACTIVATION, reason=_JOIN)
        for op in ("GlobalAveragePool", "LeakyRelu", "Sigmoid")
    ),
    OpRule(
        "AveragePool",
        moves_values=True,
        reason="QLinearAveragePool; an average lies between the values it is made of, so it keeps their scale.",
    ),
    OpRule(
        "Min",
        (Condition.CONSTANT_BOUND,),
        {1: ACTIVATION},
        moves_values=True,
        reason="Min of two uint8 tensors of one scale; equalization bounds each channel of a ReLU6 so.",
    ),
    *(
        OpRule(op, moves_values=True, reason=_MOVE)
        for op in ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")
    ),
    OpRule("Resize", (Condition.NEAREST,), moves_values=True, reason=_MOVE),
    OpRule("Resize", reason="ORT interpolates in float.", cure="Leave it float, or upsample with mode=nearest."),
    OpRule("ReduceMean", reason="ORT has no integer ReduceMean that it puts in the place of a QDQ one.", cure=_POOL),
    OpRule(
        "Softmax", reason="QLinearSoftmax takes ten times as long as float, and rounds small shares to 0.", cure=_KEEP
    ),
    *(
        OpRule(op, reason=f"ORT has no integer {op} on the CPU; between pairs it is 0.6 times as fast.", cure=_KEEP)
        for op in ("LayerNormalization", "Gelu")
    ),
    *_lookup(_weight(0), _ROWS),
)

_RUN_TIME = "one scale for each output, the activation's range measured at run time."
_NBITS = "MatMulNBits, whose integers stay integers in memory: 2.2 times faster than float where one row is multiplied."
_ONE_MATRIX = "ORT multiplies by integers that are known beforehand, as one matrix."
_NO_RECURRENCE = "ORT has no integer kernel for it."
_SLOW_CONV = "ConvInteger is at most a sixth faster than float, and 3.5 times slower where depthwise."
_CALIBRATE = "Calibrate: int8 has integer convolutions, with ranges known beforehand."

DYNAMIC_RULES = (
    OpRule("MatMul", (MATRIX,), {0: ACTIVATION, 1: _weight(1)}, reason=f"DynamicQuantizeMatMul; {_RUN_TIME}"),
    OpRule("MatMul", reason=_ONE_MATRIX, cure=_KEEP),
    OpRule(
        "Gemm",
        (MATRIX, Condition.PLAIN_GEMM),
        {0: ACTIVATION, 1: _weight(1)},
        reason=f"DynamicQuantizeMatMul, with the weight as [inputs, outputs]; {_RUN_TIME}",
    ),
    OpRule("Gemm", reason=_ONE_MATRIX, cure=_KEEP),
    OpRule(
        "LSTM",
        (Condition.CONSTANT_RECURRENCE, Condition.SEQUENCE_FIRST),
        {0: ACTIVATION, 1: _weight(1), 2: _weight(1)},
        reason="DynamicQuantizeLSTM; one scale for each gate of each unit and direction.",
    ),
    OpRule("LSTM", reason="DynamicQuantizeLSTM takes constant weights, and sequences along axis 0.", cure=_KEEP),
    *(OpRule(op, reason=_NO_RECURRENCE, cure="Use an LSTM, or leave it float.") for op in ("GRU", "RNN")),
    *(OpRule(op, reason=_SLOW_CONV, cure=_CALIBRATE) for op in ("Conv", "ConvTranspose")),
    *_lookup(_weight(0), _ROWS),
)

BLOCK = 32
"""Weights that share a scale, unless the options say otherwise."""

BLOCKS = Scheme(WEIGHT, symmetric=True, granularity=PerBlock(BLOCK, 0))
"""The layout of MatMulNBits, with the scales that lose least."""

UINT4 = IntegerType(4, signed=False)
BLOCKS_OF_4_BITS = Scheme(UINT4, symmetric=False, granularity=PerBlock(BLOCK, 0))
"""With zero points: MiniLM's embeddings have 13.1 dB SQNR with them and 10.8 dB without, at the same speed."""

TABLE_OF_4_BITS = Scheme(UINT4, symmetric=False, granularity=PerBlock(BLOCK, 1))


def _weight_rules(matrix: Scheme, reason: str) -> tuple[OpRule, ...]:
    return (
        OpRule("MatMul", (MATRIX,), {1: matrix}, reason=reason),
        OpRule("MatMul", reason=_ONE_MATRIX, cure=_KEEP),
        OpRule("Gemm", (MATRIX, Condition.PLAIN_GEMM), {1: matrix}, reason=reason),
        OpRule("Gemm", reason=_ONE_MATRIX, cure=_KEEP),
        *(
            OpRule(op, reason="ORT would make floats of its weight on every run.", cure=_KEEP)
            for op in ("Conv", "ConvTranspose", "LSTM", "GRU", "RNN")
        ),
    )


WEIGHT_RULES = (*_weight_rules(BLOCKS, _NBITS), *_lookup(_weight(0), _ROWS))
INT4_RULES = (*_weight_rules(BLOCKS_OF_4_BITS, _NBITS), *_lookup(TABLE_OF_4_BITS, _TABLE_BLOCKS))


def _with_block_size(rule: OpRule, size: int) -> OpRule:
    """The rule with blocks of another size; one without blocks stays as it is."""

    def resized(scheme: Scheme | None) -> Scheme | None:
        if scheme is None or not isinstance(scheme.granularity, PerBlock):
            return scheme
        return replace(scheme, granularity=replace(scheme.granularity, size=size))

    return replace(rule, inputs={index: resized(scheme) for index, scheme in rule.inputs.items()})


REDUCED = IntegerType(7, signed=True, narrow=True)
"""−63 to 63: two products with an activation of 255 add up to 32,130, which 16 bits hold."""

_REDUCED = (
    "7 bits, since x86 without VNNI adds pairs of products in 16 bits: 2 · 255 · 127 saturates, 2 · 255 · 63 fits."
)
SATURATES = (
    "This CPU has no VNNI: ONNX Runtime adds pairs of products in 16 bits here, which saturate with weights of 8 bits. "
    "--set ort-cpu.reduce_range=true gives weights of 7 bits, which cannot."
)


def saturation_warning(cpu: Device | None) -> str:
    """What who runs 8-bit weights on this CPU should know; empty where sums cannot saturate, or nothing is known."""
    return SATURATES if cpu is not None and cpu.kind == "x86" and not cpu.features & VNNI else ""


def _with_reduced_weights(rule: OpRule) -> OpRule:
    """The rule with weights of 7 bits; one without weights stays as it is."""

    def reduced(scheme: Scheme | None) -> Scheme | None:
        return replace(scheme, integer=REDUCED) if scheme is not None and scheme.integer == WEIGHT else scheme

    inputs = {index: reduced(scheme) for index, scheme in rule.inputs.items()}
    return rule if inputs == rule.inputs else replace(rule, inputs=inputs, reason=f"{rule.reason} {_REDUCED}")


CONTRACTS = {
    "int8": (Form.QDQ, INT8_RULES),
    "int8-dynamic": (Form.DYNAMIC, DYNAMIC_RULES),
    "int8-weights": (Form.WEIGHTS, WEIGHT_RULES),
    "int4": (Form.WEIGHTS, INT4_RULES),
    "fp16": (Form.HALF, ()),
    "fp32": (Form.FLOAT, ()),
}
"""What ORT is given at each precision, and the rules that it was made under."""

BLOCK_SIZES = (16, 32, 64, 128, 256)
INTEGER_ACCURACY = 4


@dataclass(frozen=True)
class Options:
    """How ONNX Runtime runs the model.

    Attributes:
        threads: Threads within an operator; 0 for one a core.
        graph_level: How far ORT may rewrite the graph.
        reduce_range: Give weights 7 bits at int8 and int8-dynamic, for x86 CPUs without VNNI.
        block_size: Weights that share a scale, at int4 and int8-weights: a power of two, 16 to 256.
        accuracy_level: How MatMulNBits multiplies, at int4 and int8-weights: at 4 activations are rounded to 8 bits,
            below 4 they stay float, which is slower.
    """

    threads: int = 0
    graph_level: GraphLevel = "all"
    reduce_range: bool = False
    block_size: int = BLOCK
    accuracy_level: int = INTEGER_ACCURACY

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            what = f"The option ort-cpu.block_size cannot be {self.block_size}."
            raise InputError(what, f"It takes: {', '.join(map(str, BLOCK_SIZES))}.")
        if not 0 <= self.accuracy_level <= INTEGER_ACCURACY:
            what = f"The option ort-cpu.accuracy_level cannot be {self.accuracy_level}."
            raise InputError(what, f"It takes: 0 to {INTEGER_ACCURACY}.")


class OrtCpu(Backend):
    """ONNX Runtime's CPU provider."""

    name = "ort-cpu"
    summary = "ONNX Runtime on the CPU: servers, desktops, edge"
    precisions = tuple(CONTRACTS)
    options_type = Options
    tolerance_lsb = 6.0

    def availability(self) -> Availability:
        """Whether onnxruntime is installed."""
        from importlib.util import find_spec

        if find_spec("onnxruntime") is None:
            return Availability(ok=False, reason="onnxruntime is not installed", cure="pip install 'qdeploy[cpu]'")
        return Availability(ok=True)

    def contract(self, precision: str, options: Options) -> QuantContract:
        """Unsigned asymmetric activations, signed symmetric weights; int32 biases with static ranges, else float."""
        form, rules = CONTRACTS[precision]
        bias: Literal["int32", "float"] = "int32" if form is Form.QDQ else "float"
        contract = QuantContract(self.name, precision, (13, 25), bias, "inputs-and-outputs", rules, form)
        if form is Form.WEIGHTS:
            return replace(contract, rules=tuple(_with_block_size(rule, options.block_size) for rule in rules))
        if form not in (Form.QDQ, Form.DYNAMIC):
            return contract
        if options.reduce_range:
            return replace(contract, rules=tuple(map(_with_reduced_weights, rules)))
        return replace(contract, advice=saturation_warning(this_cpu()))

    def lower(
        self,
        model: FloatModel | QuantizedModel,
        precision: str,
        directory: Path,
        options: Options,
        on_progress: Callable[[float], None] = no_progress,
    ) -> Artifact:
        """Write the model, load it, and read from the graph that ORT made of it what each node became."""
        main = _write(model, directory, options)
        optimized = directory / "optimized.onnx"  # here for a moment: it refers to the model's external data
        try:
            open_session(main, threads=options.threads, graph_level=options.graph_level, optimized=optimized)
            origin = model.float_model if isinstance(model, QuantizedModel) else model
            layers = _layers(questions.load_graph(origin.path), questions.load_graph(optimized))
        finally:
            optimized.unlink(missing_ok=True)
        on_progress(1.0)
        return Artifact(self.name, precision, directory, main.name, layers)

    def open(self, artifact: Artifact, options: Options) -> Runner:
        """A session on the artifact's model."""
        return SessionRunner(artifact.path, threads=options.threads, graph_level=options.graph_level)


WIDEST = 5 * 5
"""Kernel positions up to which four channels are faster than three or one; with 7×7 they are not."""


def _write(model: FloatModel | QuantizedModel, directory: Path, options: Options) -> Path:
    """The model as it is, but for what ORT runs faster, or otherwise, when it is written in another way."""
    import onnx_ir.passes.common as passes

    form = model.contract.form if isinstance(model, QuantizedModel) else Form.FLOAT
    if form not in (Form.QDQ, Form.WEIGHTS):
        return copy_model(model.path, directory)
    graph = questions.load_graph(model.path)
    if not (_rewrite_pairs(graph) if form is Form.QDQ else _set_accuracy(graph, options.accuracy_level)):
        return copy_model(model.path, directory)
    passes.RemoveUnusedNodesPass()(graph)
    path = directory / model.path.name
    questions.save_graph(graph, path)
    return path


def _rewrite_pairs(graph: ir.Model) -> bool:
    """Rewrite integer convolutions of few channels, minima of integers and rows of tables; whether there are any."""
    uneven = [node for node in graph.graph if _has_uneven_rows(node)]
    minima = [node for node in graph.graph if _has_one_scale(node)]
    tables = [node for node in graph.graph if _looks_up_integers(node)]
    for node in uneven:
        _widen(node)
    for node in minima:
        _compare_integers(node)
    for node in tables:
        _look_up_integers(node)
    return bool(uneven or minima or tables)


def _set_accuracy(graph: ir.Model, level: int) -> bool:
    """Let products of integer weights multiply at another level; whether there are any."""
    import onnx_ir as ir

    products = [node for node in graph.graph.all_nodes() if node.op_type == "MatMulNBits"]
    for node in products:
        node.attributes.add(ir.AttrInt64("accuracy_level", level))
    return bool(products)


def _looks_up_integers(node: ir.Node) -> bool:
    """Whether a node takes rows of a constant matrix of integers, each row with a scale and without zero point."""
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return False
    table, scheme = questions.stored_constant(node.inputs[0]), questions.stored_scheme(node.inputs[0])
    if table is None or scheme is None:
        return False
    return table.ndim == 2 and scheme.symmetric and scheme.granularity == PerChannel(0)


def _look_up_integers(node: ir.Node) -> None:
    """Make floats of the rows that are looked up instead of the whole table.

    Wq ─► DQ(scales) ─► Gather(i) ─► y        becomes        Wq ─► Gather(i) ─► Cast ─► Mul ─► y
                                                             scales ─► Gather(i) ───────┘
    """
    import onnx_ir as ir

    stored, scale = node.inputs[0].producer().inputs[:2]
    column = ir.tensor(scale.const_value.numpy().reshape(-1, 1), name=f"{node.name}/column")
    scales = ir.val(column.name, const_value=column)
    node.graph.register_initializer(scales)
    result = node.outputs[0]
    behind = node

    def append(op_type: str, inputs: list[ir.Value], part: str, attributes: dict[str, ir.DataType]) -> ir.Value:
        nonlocal behind
        new = ir.node(op_type, inputs, attributes, name=f"{node.name}/{part}")
        new.outputs[0].name = new.name
        node.graph.insert_after(behind, new)
        behind = new
        return new.outputs[0]

    real = append("Cast", [result], "cast", {"to": scale.dtype})
    factors = append("Gather", [scales, node.inputs[1]], "scales", {})
    product = append("Mul", [real, factors], "scaled", {})
    result.replace_all_uses_with(product, replace_graph_outputs=True)
    real.producer().replace_input_with(0, result)
    node.replace_input_with(0, stored)
    product.name, product.type, product.shape, result.name = result.name, result.type, result.shape, f"{node.name}/rows"
    result.type = ir.TensorType(stored.dtype)


def _has_uneven_rows(node: ir.Node) -> bool:
    """Whether an integer convolution of a model input sums over a number of values that four does not divide.

    ORT is slow at those: 3×3 over 3 channels of 224×224 took 1.5 times as long as over 4, 1×1 twice as long.
    """
    if node.op_type != "Conv" or node.attributes.get_int("group", 1) != 1:
        return False
    weight, scheme = questions.weight_of(node), questions.stored_scheme(node.inputs[1])
    dequantize = node.inputs[0].producer() if node.inputs[0] else None
    quantize = dequantize.inputs[0].producer() if dequantize and dequantize.inputs[0] else None
    if weight is None or scheme is None or quantize is None or quantize.op_type != "QuantizeLinear":
        return False
    reads_input = quantize.inputs[0] is not None and quantize.inputs[0].is_graph_input()
    positions, summands = math.prod(weight.shape[2:]), math.prod(weight.shape[1:])
    own = questions.sole_consumer(node.inputs[1]) and questions.sole_consumer(node.inputs[1].producer().inputs[0])
    return bool(own) and reads_input and scheme.symmetric and positions <= WIDEST and summands % 4 != 0


def _widen(node: ir.Node) -> None:
    """Give a convolution a multiple of four input channels: zeros, which leave its result as it is.

    x ─► Q ─► DQ ─► Conv(W)        becomes        x ─► Q ─► Pad(zero point) ─► DQ ─► Conv(W, zeros)
    """
    import onnx_ir as ir

    graph = node.graph
    quantized, scale, zero_point = node.inputs[0].producer().inputs
    stored = node.inputs[1].producer().inputs[0]
    integers = stored.const_value.numpy()
    widths = np.zeros((integers.ndim, 2), np.int64)
    widths[1, 1] = -integers.shape[1] % 4

    def insert(op_type: str, inputs: list[ir.Value], part: str, dtype: ir.DataType) -> ir.Value:
        new = ir.node(op_type, inputs, name=f"{node.name}/{part}")
        new.outputs[0].name, new.outputs[0].type = new.name, ir.TensorType(dtype)
        graph.insert_before(node, new)
        return new.outputs[0]

    name = f"{node.name}/widths"
    pads = ir.val(name, const_value=ir.tensor(widths.T.ravel(), name=name))
    graph.register_initializer(pads)
    padded = insert("Pad", [quantized, pads, zero_point], "wide", zero_point.dtype)
    node.replace_input_with(0, insert("DequantizeLinear", [padded, scale, zero_point], "dequantized", scale.dtype))
    stored.const_value = ir.tensor(np.pad(integers, widths), name=stored.name)
    stored.shape, node.inputs[1].shape = stored.const_value.shape, None


def _has_one_scale(node: ir.Node) -> bool:
    """Whether a Min reads and writes integers of one scale and zero point."""
    if node.op_type != "Min" or len(node.inputs) != 2:
        return False
    follower = questions.sole_consumer(node.outputs[0])
    pairs = [*(value.producer() if value is not None else None for value in node.inputs), follower]
    if [pair.op_type if pair else "" for pair in pairs] != ["DequantizeLinear", "DequantizeLinear", "QuantizeLinear"]:
        return False
    grids = {_grid(pair) for pair in pairs if pair}
    return len(grids) == 1 and None not in grids


def _grid(pair: ir.Node) -> tuple[float, int] | None:
    """Scale and zero point of a QuantizeLinear or DequantizeLinear, where it has one of each."""
    parts = [questions.constant(value) for value in pair.inputs[1:3]]
    if len(parts) != 2 or any(part is None or part.size != 1 for part in parts):
        return None
    scale, zero_point = (part.item() for part in parts if part is not None)
    return scale, zero_point


def _compare_integers(node: ir.Node) -> None:
    """Take the minimum of integers, which ORT's optimizer leaves between floats.

    x ─► DQ ─► Min(DQ(c)) ─► Q ─► y        becomes        x ─► Min(c) ─► y        all of one scale
    """
    import onnx_ir as ir

    (quantize,) = node.outputs[0].consumers()
    for index, value in enumerate(node.inputs):
        node.replace_input_with(index, value.producer().inputs[0])
    result = node.outputs[0]
    result.name, result.type = f"{node.name}/integers", ir.TensorType(quantize.inputs[2].dtype)
    quantize.outputs[0].replace_all_uses_with(result)
    node.graph.remove(quantize, safe=True)


@dataclass(frozen=True)
class _Operands:
    """Where an operator of the optimized graph keeps its weight, and the zero point that its output has.

    Without a zero point the output is float; an operator that is listed nowhere hands its first input's type on.
    """

    weight: int | None = None
    output_zero_point: int | None = None


_FLOAT_WEIGHTED = (
    "Conv",
    "FusedConv",
    "ConvTranspose",
    "Gemm",
    "FusedGemm",
    "MatMul",
    "FusedMatMul",
    "LSTM",
    "GRU",
    "RNN",
)
_UNARY = ("Sigmoid", "LeakyRelu", "Softmax", "GlobalAveragePool", "AveragePool")

OPERANDS = {
    "QuantizeLinear": _Operands(output_zero_point=2),
    "QLinearConv": _Operands(weight=3, output_zero_point=7),
    "QLinearMatMul": _Operands(weight=3, output_zero_point=7),
    "QGemm": _Operands(weight=3, output_zero_point=8),
    "MatMulIntegerToFloat": _Operands(weight=1),
    **{op: _Operands(weight=1) for op in ("DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "MatMulNBits")},
    "MatMulInteger": _Operands(weight=1),
    "GatherBlockQuantized": _Operands(weight=0),
    "QLinearAdd": _Operands(output_zero_point=7),
    "QLinearMul": _Operands(output_zero_point=7),
    "QLinearConcat": _Operands(output_zero_point=1),
    **{f"QLinear{op}": _Operands(output_zero_point=4) for op in _UNARY},
    **{op: _Operands(weight=1) for op in _FLOAT_WEIGHTED},
    **{op: _Operands() for op in ("DequantizeLinear", "Cast", "Where")},
}
"""The operators that ORT's optimizer leaves or puts into a graph (onnxruntime, docs/ContribOperators.md)."""

RESULTS = {
    "DynamicQuantizeLinear": ("uint8", "fp32", "uint8"),
    "MatMulInteger": ("int32",),
    **dict.fromkeys(("Shape", "Size"), ("int64",)),
}
"""The types of what an operator writes, where they do not depend on what it reads."""

_TYPES = {"FLOAT": "fp32", "FLOAT16": "fp16", "DOUBLE": "fp64"}


def _layers(original: ir.Model, optimized: ir.Model) -> tuple[Layer, ...]:
    """What each node of the float model became in the graph that ORT runs; "unknown" where it cannot be found there."""
    hosts = _hosts(original, optimized)
    types = _types(optimized.graph)
    names: dict[int, list[str]] = {}
    for name, host in hosts.items():
        names.setdefault(id(host), []).append(name)
    layers = []
    for node in original.graph.all_nodes():
        if not any(questions.is_real(value) for value in node.outputs) or _bodies(node):
            continue  # it computes a shape, or the nodes inside it do its work
        name, host = str(node.name), hosts.get(str(node.name))
        if host is None:
            layers.append(Layer(name, node.op_type, "", (), None, (), "unknown"))
            continue
        fused_with = tuple(other for other in names[id(host)] if other != name)
        layers.append(_layer(node, host, types, fused_with))
    return tuple(layers)


def _layer(node: ir.Node, host: ir.Node, types: dict[str, str], fused_with: tuple[str, ...]) -> Layer:
    place = _weight_place(node, host)
    weights = _weight_type(host, place, types) if place is not None else None
    computed = [
        types[questions.name_of(value)]
        for index, value in enumerate(host.inputs)
        if value is not None and index != place and questions.constant(value) is None
    ]
    outputs = tuple(types[questions.name_of(value)] for value in host.outputs if value.name)
    precision = _precision(host, (*computed, weights))
    return Layer(str(node.name), node.op_type, str(host.name), tuple(computed), weights, outputs, precision, fused_with)


def _weight_place(node: ir.Node, host: ir.Node) -> int | None:
    """Which input of an operator of the optimized graph is the weight or the table of a node of the float model."""
    if node.op_type == "Gather":
        return 0 if questions.holds(Condition.ROWS_OF_MATRIX, node, frozenset()) else None
    return OPERANDS.get(host.op_type, _Operands()).weight if questions.has_weight(node) else None


def _weight_type(host: ir.Node, place: int, types: dict[str, str]) -> str:
    if host.op_type == "MatMulNBits":  # its bytes hold integers of any width
        return f"int{host.attributes.get_int('bits', 4)}"
    return types[questions.name_of(host.inputs[place])]


def _precision(host: ir.Node, operands: tuple[str | None, ...]) -> str:
    """What an operator computes in, from the types that it reads."""
    if any(kind in ("int4", "uint4") for kind in operands):
        return "int4"
    if host.op_type != "Cast" and any(kind in ("int8", "uint8") for kind in operands):
        return "int8"
    return "fp16" if "fp16" in operands else "fp32"


def _bodies(node: ir.Node) -> list[ir.Graph]:
    """The subgraphs of an If, a Loop or a Scan."""
    import onnx_ir as ir

    return [each.as_graph() for each in node.attributes.values() if each.type == ir.AttributeType.GRAPH]


def _hosts(original: ir.Model, optimized: ir.Model) -> dict[str, ir.Node]:
    """Node name → the node of the optimized graph that does its work, for those that are found.

    ORT keeps the name of a node that it rewrites, with marks of its own; its blocked float layout (NCHWc) names nodes
    after what they write. Activations and sums that have no node any more run in the layer that computes their input.
    """
    order = {id(node): index for index, node in enumerate(optimized.graph.all_nodes())}
    built = {_without_marks(str(node.name)): node for node in reversed(list(optimized.graph.all_nodes()))}
    hosts: dict[str, ir.Node] = {}
    for node in original.graph.all_nodes():
        blocked = (f"{value.name}_nchwc" for value in (questions.result_of(node), node.outputs[0]))
        host = next((built[name] for name in (str(node.name), *blocked) if name in built), None)
        if host is None:
            before = [hosts[name] for name in _producers(node) if name in hosts]
            last = max(before, key=lambda found: order[id(found)], default=None)
            host = last if last is not None and _performs(last, node) else None
        if host is not None:
            hosts[str(node.name)] = host
    return hosts


def _without_marks(name: str) -> str:
    """A node's name without what ORT's optimizers put around it."""
    return re.sub(r"_token_\d+$", "", name.removeprefix("fused ")).removesuffix("/MatMulAddFusion")


def _producers(node: ir.Node) -> list[str]:
    """Names of the nodes into which ORT may have fused this one: a sum goes into a product alone."""
    producers = [value.producer() for value in node.inputs if value is not None]
    return [str(p.name) for p in producers if p and (node.op_type != "Add" or p.op_type in questions.WEIGHTED)]


def _performs(host: ir.Node, node: ir.Node) -> bool:
    """Whether an operator of the optimized graph also does the work of a node behind it that is there no more."""
    if node.op_type == "Add":
        reads = {value.name for value in host.inputs if value is not None}
        if any(
            value.name in reads for value in node.inputs if value is not None and questions.constant(value) is not None
        ):
            return True
        blocked_sum = host.domain == "com.microsoft.nchwc" and len(host.inputs) > 3
        return blocked_sum or str(host.name).endswith("/MatMulAddFusion")
    return node.op_type in questions.ACTIVATIONS and host.op_type in OPERANDS


def _types(graph: ir.Graph, outer: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Element type of every value, by name: ORT writes those of its constants, inputs and outputs only.

    Args:
        graph: The graph, or a subgraph.
        outer: The types of the graph around it.
    """
    constants = graph.initializers.values()
    types = {**outer, **{questions.name_of(value): _type(value) for value in (*graph.inputs, *constants)}}
    for node in graph:
        for body in _bodies(node):
            types |= _types(body, types)
        results = _result_types(node, types)
        for value, kind in zip(node.outputs, results, strict=True):
            types[str(value.name)] = _type(value) if value.dtype is not None else kind
    return types


def _result_types(node: ir.Node, types: Mapping[str, str]) -> tuple[str, ...]:
    """What a node writes, as far as it follows from what it reads."""
    import onnx_ir as ir

    if node.op_type in RESULTS:
        return RESULTS[node.op_type]
    if bodies := _bodies(node):
        results = bodies[-1].outputs[1:] if node.op_type == "Loop" else bodies[-1].outputs
        return tuple(types[questions.name_of(value)] for value in results)
    reads = [types[questions.name_of(value)] for value in node.inputs if value is not None]
    operands = OPERANDS.get(node.op_type)
    if node.op_type == "Cast":
        kind = _type_name(ir.DataType(node.attributes.get_int("to", ir.DataType.FLOAT)))
    elif operands is None:
        kind = reads[0] if reads else "fp32"
    elif operands.output_zero_point is None or operands.output_zero_point >= len(node.inputs):
        kind = "fp16" if "fp16" in reads else "fp32"
    else:
        kind = types[questions.name_of(node.inputs[operands.output_zero_point])]
    return (kind,) * len(node.outputs)


def _type(value: ir.Value) -> str:
    return _type_name(value.dtype) if value.dtype is not None else "unknown"


def _type_name(dtype: ir.DataType) -> str:
    name = str(dtype.name)
    return _TYPES.get(name, name.lower())
