"""The questions that are asked of an ONNX graph more than once; reading and writing it, too.

Graphs are onnx-ir models: `ir.Model`, `ir.Node`, `ir.Value`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.affine import IntegerType
from qdeploy.errors import InputError, InternalError
from qdeploy.model import DimRange, FloatModel, TensorSpec, digest_of_files, model_files
from qdeploy.scheme import Condition, PerBlock, PerChannel, PerTensor, Scheme

if TYPE_CHECKING:
    import onnx_ir as ir
    from google.protobuf.message import Message

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators with a weight at input 1."""

RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
"""Operators with an input weight at input 1 and a recurrence weight at input 2."""

QUANTIZABLE = WEIGHTED | {
    *("Add", "Mul", "Sub", "Div", "Concat", "Resize", "Pad"),
    *("AveragePool", "GlobalAveragePool", "MaxPool", "ReduceMean"),
    *("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Gelu", "Softmax"),
    *("LayerNormalization", "InstanceNormalization", "GroupNormalization"),
}
"""Operators that compute on real values and that some target may run in integers: calibration observes them."""

ACTIVATIONS = frozenset({"Relu", "Clip"})
"""Activations that a quantized operator performs by saturation, at no cost."""

EXTERNAL_DATA_BYTES = 1 << 30
"""Models with more weights than this are saved with external data; protobuf itself ends at 2 GiB."""

LFS_POINTER = b"version https://git-lfs"
"""What a file begins with that Git has not fetched."""

LONGEST_REASON = 300
"""How many characters of what ONNX's checker says a message repeats: it goes through every node behind the fault."""


def load_graph(path: Path) -> ir.Model:
    """Read a model; weights in external data stay on disk until they are used.

    Raises:
        InputError: The file is missing or is no ONNX model, or its external data are missing or too short.
    """
    import onnx_ir as ir
    from google.protobuf.message import DecodeError

    try:
        model = ir.load(path)
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value.numpy()  # maps the file, reads nothing yet
                value.const_value.release()
    except FileNotFoundError as error:
        raise InputError(f"There is no model file {error.filename or path}.", "Check the path.") from error
    except (DecodeError, ir.serde.SerdeError, ValueError, TypeError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not an ONNX model, or is damaged ({error}).", "Export it anew.") from error
    if not model.opset_imports or not model.graph.outputs:
        raise InputError(f"{path} is not an ONNX model: it has no operator set or no outputs.", "Export it anew.")
    return model


def require_sound(path: Path) -> None:
    """Refuse a file from outside with which ONNX's own checker finds fault, before anything is made of it.

    The checker also refuses external data that lie outside the model's folder, or are no regular files.

    Raises:
        InputError: The file is missing, is no ONNX model, or its graph contradicts itself.
    """
    import onnx

    if not path.exists():
        raise InputError(f"There is no model file {path}.", "Check the path.")
    try:
        onnx.checker.check_model(str(path), full_check=True)
        _require_utf8(onnx.load(path, load_external_data=False))
    except Exception as error:  # its classes have no common root
        reason = textwrap.shorten(str(error), LONGEST_REASON, placeholder=" …")
        raise InputError(f"{path} is not an ONNX model, or is damaged ({reason}).", _cure(path, reason)) from error


def _cure(path: Path, reason: str) -> str:
    """What to do about a file that ONNX's checker refuses."""
    if path.is_file() and path.read_bytes().startswith(LFS_POINTER):
        return "It is a pointer of Git LFS: git lfs pull fetches the model."
    if "'shape' of 'type' is required" in reason:
        return "Give its inputs and outputs shapes: onnx.shape_inference.infer_shapes, or export it anew."
    return "Export it anew."


def _require_utf8(message: Message) -> None:
    """Refuse a message with a text that is no UTF-8, such as a name: protobuf hands it out as bytes."""
    for field, content in message.ListFields():
        if field.type in (field.TYPE_STRING, field.TYPE_MESSAGE):
            for part in (content,) if isinstance(content, str | bytes) or hasattr(content, "ListFields") else content:
                if isinstance(part, bytes):
                    raise ValueError(f"the text {part!r} is no UTF-8")  # noqa: TRY004 - what is wrong is the text
                if not isinstance(part, str):
                    _require_utf8(part)


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a model; large ones with their weights beside it in `<name>.data`."""
    import onnx_ir as ir

    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if weights > EXTERNAL_DATA_BYTES:
        ir.save(model, path, external_data=f"{path.name}.data")
    else:  # weights that lie beside the file they were read from would not be found from here
        ir.save(ir.external_data.load_to_model(model), path)


def describe(path: Path, name: str, dims: Mapping[str, DimRange]) -> FloatModel:
    """The FloatModel that a file on disk is."""
    model = load_graph(path)
    constants = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    parameters = sum(tensor.size for tensor in constants if tensor.dtype.is_floating_point())
    inputs = tuple(spec(v) for v in model.graph.inputs if not v.is_initializer())
    outputs = tuple(spec(v) for v in model.graph.outputs)
    return FloatModel(path, digest_of_files(model_files(path)), name, inputs, outputs, parameters, dims)


def spec(value: ir.Value) -> TensorSpec:
    """Name, dtype and shape of a graph input or output; a dimension without name is called after its place."""
    if value.dtype is None or value.shape is None:
        raise InputError(f"The model's {value.name!r} has no type or shape.", "Run shape inference and export it anew.")
    dims = (d if isinstance(d, int) else d.value or f"{value.name}_{i}" for i, d in enumerate(value.shape))
    return TensorSpec(str(value.name), value.dtype.numpy().name, tuple(dims))


def name_of(value: ir.Value) -> str:
    """A value's name; a prepared graph has no nameless ones."""
    if value.name is None:
        message = "a value of the graph has no name"
        raise InternalError(message)
    return str(value.name)


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array that a value always holds, or None if it is computed."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    array: NDArray[Any] = value.const_value.numpy()
    return array


def is_real(value: ir.Value | None) -> bool:
    """Whether a value holds floating-point numbers (and not shapes, indices or flags)."""
    return value is not None and value.dtype is not None and value.dtype.is_floating_point()


def stored_constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array that a value always holds, or the integers behind it if a DequantizeLinear delivers them."""
    node = value.producer() if value is not None else None
    return constant(node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else value)


def is_table(value: ir.Value) -> bool:
    """Whether a value is read by lookups alone."""
    readers = value.consumers()
    return len(readers) > 0 and all(reader.op_type == "Gather" for reader in readers)


def weight_of(node: ir.Node) -> NDArray[Any] | None:
    """The constant weight of a Conv, ConvTranspose, Gemm or MatMul, in its stored layout; None without one.

    In a quantized graph these are its integers.
    """
    if node.op_type not in WEIGHTED or len(node.inputs) < 2 or node.domain:
        return None
    weight = stored_constant(node.inputs[1])
    return weight if weight is not None and weight.ndim >= 2 else None


def has_weight(node: ir.Node) -> bool:
    """Whether a node computes with a constant weight at input 1."""
    return weight_of(node) is not None or (node.op_type in RECURRENT and constant(node.inputs[1]) is not None)


def bias_input(node: ir.Node) -> tuple[ir.Node, int] | None:
    """Where a weighted node's constant bias is read: (node, input index). A MatMul's bias is the Add behind it.

    A bias is one value for each output channel, or one for all; what differs from row to row is none.
    """
    if node.op_type != "MatMul":
        added = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        return (node, 2) if added is not None and (added.ndim == 0 or added.size == added.shape[-1]) else None
    follower = sole_consumer(node.outputs[0])
    if follower is None or follower.op_type != "Add":
        return None
    for index, operand in enumerate(follower.inputs):
        array = constant(operand)
        if array is not None and array.ndim > 0 and array.size == array.shape[-1]:
            return follower, index
    return None


def sole_consumer(value: ir.Value) -> ir.Node | None:
    """The only node that reads a value, or None if several do or the value is a graph output."""
    if value.is_graph_output() or len(value.uses()) != 1:
        return None
    return next(iter(value.consumers()))


def activation_bounds(node: ir.Node) -> tuple[float, float]:
    """The interval that a Relu or a Clip with constant limits confines its input to."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    limits = [float("-inf"), float("inf")]
    for place, value in enumerate(node.inputs[1:3]):
        if value is not None:
            array = constant(value)
            limits[place] = float(array.item()) if array is not None and array.size == 1 else float("nan")
    return limits[0], limits[1]


def fused_activation(node: ir.Node) -> ir.Node | None:
    """The Relu or Clip that can be performed by saturating this node's quantized output, or None.

    Its interval must contain zero, as every quantized range does: a Clip to [0.5, 3] would lose its lower bound.
    """
    follower = sole_consumer(node.outputs[0])
    if node.op_type in ACTIVATIONS or follower is None or follower.op_type not in ACTIVATIONS or follower.domain:
        return None
    low, high = activation_bounds(follower)
    return follower if low <= 0.0 <= high else None


def result_of(node: ir.Node) -> ir.Value:
    """A node's output, behind the activation fused into it."""
    return (fused_activation(node) or node).outputs[0]


def bounded(value: ir.Value) -> ir.Value:
    """What a Min with a constant leaves of a value that nothing else reads, or else the value itself.

    The values above the bound need no integers: all that follows sees the bounded ones.
    """
    follower = sole_consumer(value)
    if follower is None or follower.op_type != "Min" or not holds(Condition.CONSTANT_BOUND, follower, frozenset()):
        return value
    return follower.outputs[0]


def real_inputs(node: ir.Node) -> list[tuple[int, ir.Value]]:
    """Index and value of each computed floating-point input."""
    return [(i, v) for i, v in enumerate(node.inputs) if v is not None and is_real(v) and constant(v) is None]


def input_channel_axis(node: ir.Node) -> int | None:
    """The axis of input 0 along which a weighted node's weight reads channels."""
    if weight_of(node) is None:
        return None
    if node.op_type == "Gemm" and node.attributes.get_int("transA", 0):
        return 0
    return 1 if node.op_type in ("Conv", "ConvTranspose") else -1


def output_channel_axis(node: ir.Node) -> int | None:
    """The axis of the output along which a weighted node writes channels."""
    if weight_of(node) is None:
        return None
    return 1 if node.op_type in ("Conv", "ConvTranspose") else -1


def weight_channel_axis(node: ir.Node) -> int:
    """The axis of a weight that holds output channels (for a grouped ConvTranspose, those of one group)."""
    if node.op_type == "MatMul":
        return -1
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return 0 if node.op_type == "Conv" else 1


def observed_tensors(model: ir.Model) -> dict[str, int | None]:
    """Tensor name → channel axis of everything that calibration observes, in graph order.

    Those are the inputs and the outputs (behind a fused activation) of every quantizable operator. The channel axis
    is that of the weighted node which reads the tensor, or else of the one which writes it.
    """
    axes: dict[str, int | None] = {}
    for node in model.graph:
        if node.op_type not in QUANTIZABLE or node.domain:
            continue
        for index, value in real_inputs(node):
            axis = input_channel_axis(node) if index == 0 else None
            if not _is_inside_fusion(value):
                axes[name_of(value)] = axes.get(name_of(value)) if axis is None else axis
        written = result_of(node)
        if is_real(written) and not _is_inside_fusion(written):
            axes.setdefault(name_of(written), output_channel_axis(node))
    return axes


def _is_inside_fusion(value: ir.Value) -> bool:
    """Whether a value lies between an operator and the activation fused into it, so that it never exists."""
    producer = value.producer()
    return producer is not None and producer.op_type in QUANTIZABLE and fused_activation(producer) is not None


def is_split(value: ir.Value) -> bool:
    """Whether a value is read in parts: product ─► bias ─► Reshape ─► Transpose ─► Split, Slices or Gathers."""
    readers = [node for node in value.consumers() if node.op_type != "Shape"]
    if len(readers) != 1:
        return len(readers) > 1 and all(node.op_type in ("Slice", "Gather") for node in readers)
    (reader,) = readers
    if reader.op_type == "Add":
        return any(constant(operand) is not None for operand in reader.inputs) and is_split(reader.outputs[0])
    hands_on = ("Reshape", "Transpose", "Squeeze", "Unsqueeze")
    return reader.op_type == "Split" or (reader.op_type in hands_on and is_split(reader.outputs[0]))


def holds(condition: Condition, node: ir.Node, quantized: AbstractSet[str]) -> bool:  # noqa: C901, PLR0911, PLR0912 - an answer a question
    """Answer a contract's question about a node.

    Args:
        condition: The question.
        node: A node of a prepared graph.
        quantized: Names of the tensors that the nodes before this one already deliver as integers.
    """
    match condition:
        case Condition.CONSTANT_WEIGHT:
            return weight_of(node) is not None
        case Condition.CONSTANT_MATRIX:
            weight = weight_of(node)
            return weight is not None and weight.ndim == 2
        case Condition.EVEN_OUTPUTS:
            weight = weight_of(node)
            return weight is not None and weight.shape[weight_channel_axis(node)] % 2 == 0
        case Condition.BLOCKS_OF_16 | Condition.BLOCKS_OF_32 | Condition.BLOCKS_OF_64 | Condition.BLOCKS_OF_128:
            size, inputs = int(condition.name.removeprefix("BLOCKS_OF_")), _inputs_of_constant(node)
            return inputs > size and inputs % size == 0
        case Condition.CONSTANT_TABLE:
            return is_real(node.inputs[0]) and stored_constant(node.inputs[0]) is not None
        case Condition.ROWS_OF_MATRIX:
            table = stored_constant(node.inputs[0]) if is_real(node.inputs[0]) else None
            return table is not None and table.ndim == 2 and node.attributes.get_int("axis", 0) == 0
        case Condition.CONSTANT_RECURRENCE:
            return all(constant(value) is not None for value in node.inputs[1:3])
        case Condition.DEPTHWISE:
            weight = weight_of(node)
            group = node.attributes.get_int("group", 1)
            return weight is not None and group > 1 and weight.shape[1] == 1 and group == weight.shape[0]
        case Condition.TRANSPOSED_B:
            return weight_of(node) is not None and bool(node.attributes.get_int("transB", 0))
        case Condition.CONSTANT_BIAS:
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            return bias is None or stored_constant(bias) is not None
        case Condition.CONSTANT_BOUND:
            bound = stored_constant(node.inputs[1]) if len(node.inputs) == 2 else None
            return bound is not None and constant(node.inputs[0]) is None and bool(np.all(bound >= 0))
        case Condition.NEAREST:
            return bool(node.attributes.get_string("mode", "nearest") == "nearest")
        case Condition.BETWEEN_QUANTIZED:
            operands = [name_of(value) for _, value in real_inputs(node)]
            return len(operands) > 0 and all(name in quantized for name in operands)
        case Condition.GRAPH_OUTPUT:
            return result_of(node).is_graph_output() and not result_of(node).consumers()
        case Condition.SPLIT_RESULT:
            return is_split(result_of(node))
        case Condition.PLAIN_GEMM:
            factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
            return factors == [1.0, 1.0] and not bool(node.attributes.get_int("transA", 0))
        case Condition.SEQUENCE_FIRST:
            return not bool(node.attributes.get_int("layout", 0))


def _inputs_of_constant(node: ir.Node) -> int:
    """How many values of a weight belong to an output, or of a table to a row; 0 without such a constant."""
    table = stored_constant(node.inputs[0]) if node.op_type == "Gather" else None
    if table is not None:
        return int(table.shape[-1]) if table.ndim else 0
    weight = weight_of(node)
    return weight.size // weight.shape[weight_channel_axis(node)] if weight is not None and weight.size else 0


def integer_type(dtype: ir.DataType) -> IntegerType | None:
    """The integer type that an ONNX element type is, or None for a floating-point or boolean type."""
    import onnx_ir as ir

    if not dtype.is_integer():
        return None
    unsigned = {ir.DataType.UINT2, ir.DataType.UINT4, ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32}
    return IntegerType(int(dtype.bitwidth), signed=dtype not in unsigned)


def stored_scheme(value: ir.Value | None) -> Scheme | None:
    """How a value is stored as integers, read off the DequantizeLinear that delivers it; None if it is float.

    A zero point of zero, or in the middle of an unsigned grid, everywhere, counts as symmetric.
    """
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return None
    stored = node.inputs[0].dtype or (node.inputs[2].dtype if len(node.inputs) > 2 and node.inputs[2] else None)
    integer = integer_type(stored) if stored is not None else None
    if integer is None:
        return None
    zero_point = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1, np.int8)
    middle = 0 if integer.signed else (integer.qmax + 1) // 2
    symmetric = zero_point is not None and bool(np.all(zero_point.astype(np.int64) == middle))
    scale = constant(node.inputs[1])
    axis = node.attributes.get_int("axis", 1)
    block = node.attributes.get_int("block_size", 0)
    if block:
        return Scheme(integer, symmetric, PerBlock(block, axis))
    per_channel = scale is not None and scale.ndim == 1 and scale.size > 1
    return Scheme(integer, symmetric, PerChannel(axis) if per_channel else PerTensor())


def is_quantized(model: ir.Model) -> bool:
    """Whether a graph already holds quantized operators."""
    marks = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"}
    marks |= {"MatMulInteger", "ConvInteger", "MatMulNBits", "DynamicQuantizeMatMul", "QGemm", "QLinearAdd"}
    marks |= {"DynamicQuantizeLSTM"}
    return any(node.op_type in marks for node in model.graph.all_nodes())
