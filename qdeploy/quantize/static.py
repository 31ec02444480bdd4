"""QuantPlan → QuantizedModel: QDQ pairs inserted by ONNX Runtime's QDQQuantizer, with our ranges and scales."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qdeploy import graph as questions
from qdeploy.affine import Affine, IntegerType, Range
from qdeploy.affine import quantize as affine_quantize
from qdeploy.errors import UnavailableError
from qdeploy.model import QuantizedModel
from qdeploy.plan import QuantPlan
from qdeploy.quantize.check import check_quantized, quantized_tensor
from qdeploy.quantize.write import write

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


def quantize(plan: QuantPlan, directory: Path) -> QuantizedModel:
    """Write the quantized model to `directory/model.onnx` and check it.

    Raises:
        UnavailableError: onnxruntime is not installed.
        InternalError: The result is not what the plan asked for.
    """
    import onnx_ir as ir
    import onnx_ir.passes.common as passes

    graph = questions.load_graph(plan.model.path)
    replace_constants(graph, plan)
    _absorb_activations(graph, plan)
    quantized_nodes = [str(n.name) for n in graph.graph if n.name in plan.nodes and plan.nodes[n.name].quantized]
    whole = ir.to_proto(ir.external_data.load_to_model(graph))  # ORT looks for external data in the current folder
    graph = ir.from_proto(_insert_qdq(whole, plan, _rounding(graph, plan, quantized_nodes)))
    _round_in_bodies(graph)
    _leave_float(graph, plan)
    _store_weights(graph, plan)
    passes.RemoveUnusedNodesPass()(graph)
    graph.graph.sort()
    check_quantized(graph, plan)
    return write(graph, plan.model, plan.contract, quantized_nodes, directory)


def replace_constants(graph: ir.Model, plan: QuantPlan) -> None:
    """Put the weights and biases that recovery steps changed in place."""
    import onnx_ir as ir

    for name, array in plan.replaced.items():
        graph.graph.initializers[name].const_value = ir.tensor(array, name=name)
    nodes = {node.name: node for node in graph.graph}
    for node_name, array in plan.biases.items():
        node = nodes[node_name]
        reader, index = questions.bias_input(node) or (node, 2)
        old = reader.inputs[index] if index < len(reader.inputs) else None
        present = questions.constant(old)
        shaped = array.reshape(present.shape) if present is not None and present.size == array.size else array
        # A new initializer each time: the old one may serve another node, too.
        name = f"{node_name}.bias_corrected"
        value = ir.val(name, const_value=ir.tensor(shaped, name=name))
        graph.graph.register_initializer(value)
        if index >= len(reader.inputs):
            reader.resize_inputs(index + 1)
        reader.replace_input_with(index, value)


def _rounding(graph: ir.Model, plan: QuantPlan, names: list[str]) -> list[str]:
    """Without the operators whose constants alone are stored as integers.

    ORT would round the states of a recurrence, too, and give what is looked up the scales of its table.
    """
    nodes = {str(node.name): node for node in graph.graph if node.name in names}
    return [name for name in names if not _has_integer_constants_alone(nodes[name], plan)]


def _has_integer_constants_alone(node: ir.Node, plan: QuantPlan) -> bool:
    if node.op_type == "Gather":
        return node.inputs[0] is not None and node.inputs[0].name in plan.weights
    return node.op_type in questions.RECURRENT


def _absorb_activations(graph: ir.Model, plan: QuantPlan) -> None:
    """Remove each Relu or Clip that the quantized output of the node before it performs by saturation.

    Conv ─► y ─► Clip ─► z ─► …        becomes        Conv ─► z ─► …        where Q(z) covers no more than the Clip
    """
    for node in list(graph.graph):
        activation = questions.fused_activation(node)
        if activation is None or not plan.nodes[str(node.name)].quantized:
            continue
        affine = plan.activations.get(questions.name_of(activation.outputs[0]))
        if affine is None or not _saturates_within(affine, questions.activation_bounds(activation)):
            continue
        before, after = node.outputs[0], activation.outputs[0]
        if before.name in plan.activations:  # moved values keep the scale that they came with
            continue
        name, after.name = after.name, f"{after.name}/absorbed"
        after.replace_all_uses_with(before, replace_graph_outputs=True)
        graph.graph.remove(activation, safe=True)
        before.name = name


def _round_in_bodies(graph: ir.Model) -> None:
    """Let the bodies of If, Loop and Scan read what their neighbours read; ORT's tool looks at no body.

    Conv ─► y ─┬─► Q ─► DQ ─► …        becomes        Conv ─► y ─► Q ─► DQ ─┬─► …
               └─► If's body                                                └─► If's body

    Otherwise the Conv would stay float for it, and a body miss the activation that rounding performs.
    """
    for node in graph.graph:
        rounding = node.inputs[0].producer() if node.op_type == "DequantizeLinear" and node.inputs[0] else None
        exact = rounding.inputs[0] if rounding is not None and rounding.op_type == "QuantizeLinear" else None
        if exact is not None and exact.producer() is not None:
            for reader, index in exact.uses():
                if reader.graph is not graph.graph:
                    reader.replace_input_with(index, node.outputs[0])


def _saturates_within(affine: Affine, bounds: tuple[float, float]) -> bool:
    """Whether a grid ends where an activation does, up to one step."""
    scale, zero_point = float(affine.scale), int(affine.zero_point)
    low = scale * (affine.integer.qmin - zero_point)
    high = scale * (affine.integer.qmax - zero_point)
    return low >= bounds[0] - scale and high <= bounds[1] + scale


def _insert_qdq(proto: onnx.ModelProto, plan: QuantPlan, nodes: list[str]) -> onnx.ModelProto:
    """Let ORT's QDQQuantizer insert the pairs; its options stand here only, since it ignores misspelt ones."""
    try:
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    except ModuleNotFoundError as error:
        raise UnavailableError("onnxruntime is not installed.", "Install it: pip install 'qdeploy[cpu]'") from error
    if not nodes:
        return proto
    chosen = [node for node in proto.graph.node if node.name in set(nodes)]
    types = sorted({node.op_type for node in chosen})
    # ORT wants a range for every output of a quantized node; `_leave_float` removes what the plan does not quantize.
    ranges = {name: Range(0.0, 1.0) for node in chosen for name in node.output} | dict(plan.ranges)
    data = {n: TensorData(lowest=np.float32(r.minimum), highest=np.float32(r.maximum)) for n, r in ranges.items()}
    with _marked_as_inferred(proto), _quiet_logging():
        quantizer = QDQQuantizer(
            proto,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=_quant_type(_activation_type(plan)),
            tensors_range=TensorsData(CalibrationMethod.MinMax, data),
            nodes_to_quantize=nodes,
            nodes_to_exclude=[],
            op_types_to_quantize=types,
            extra_options={
                "ActivationSymmetric": False,
                "WeightSymmetric": True,
                "QuantizeBias": plan.contract.bias == "int32",
                "QDQKeepRemovableActivations": True,
                "QDQDisableWeightAdjustForInt32Bias": True,
                "TensorQuantOverrides": _overrides(plan),
            },
        )
        return quantizer.quantize_model()


def _overrides(plan: QuantPlan) -> dict[str, list[dict[str, Any]]]:
    """Every scale and zero point of the plan, in the form that ORT takes them."""
    overrides: dict[str, list[dict[str, Any]]] = {}
    for name, affine in (*plan.activations.items(), *plan.weights.items()):
        kind = _quant_type(affine.integer)
        axis = {} if affine.axis is None else {"axis": affine.axis}
        overrides[name] = [
            {"quant_type": kind, "scale": np.asarray(scale), "zero_point": np.asarray(zero_point), **axis}
            for scale, zero_point in zip(np.ravel(affine.scale), np.ravel(affine.zero_point), strict=True)
        ]
    return overrides


def _activation_type(plan: QuantPlan) -> IntegerType:
    return next((affine.integer for affine in plan.activations.values()), IntegerType(signed=False))


def _quant_type(integer: IntegerType) -> Any:
    from onnxruntime.quantization import QuantType

    return QuantType[f"Q{'' if integer.signed else 'U'}Int{integer.stored_bits}"]


@contextmanager
def _marked_as_inferred(proto: onnx.ModelProto) -> Iterator[None]:
    """Shapes are inferred already; without this mark ORT writes the model to disk and infers them again."""
    mark = proto.metadata_props.add()
    mark.key, mark.value = "onnx.infer", "onnxruntime.quant"
    try:
        yield
    finally:
        del proto.metadata_props[:]


@contextmanager
def _quiet_logging() -> Iterator[None]:
    """ORT's quantizer logs to the root logger what the plan has decided on purpose."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)


def _store_weights(graph: ir.Model, plan: QuantPlan) -> None:
    """Store the planned constants that ORT has left as floats.

    W ─► LSTM        becomes        Wq, scale, zero_point ─► DequantizeLinear ─► LSTM
    """
    import onnx_ir as ir

    for name, affine in plan.weights.items():
        weight = graph.graph.initializers.get(name)
        if weight is None or weight.const_value is None:
            continue
        integers = affine_quantize(weight.const_value.numpy(), affine)
        parts = {"quantized": integers, "scale": affine.scale, "zero_point": affine.zero_point}
        values = [
            ir.val(f"{name}_{part}", const_value=ir.tensor(array, name=f"{name}_{part}"))
            for part, array in parts.items()
        ]
        for value in values:
            graph.graph.register_initializer(value)
        axis = {} if affine.axis is None else {"axis": affine.axis}
        dequantize = ir.node("DequantizeLinear", values, axis, name=f"{name}_DequantizeLinear")
        dequantize.outputs[0].name = f"{name}_DequantizeLinear_Output"
        dequantize.outputs[0].type, dequantize.outputs[0].shape = weight.type, weight.shape
        graph.graph.append(dequantize)
        weight.replace_all_uses_with(dequantize.outputs[0])
        del graph.graph.initializers[name]


def _leave_float(graph: ir.Model, plan: QuantPlan) -> None:
    """Take away the pairs behind outputs that the plan leaves float: ORT decides by operator type, the plan by node.

    Gemm ─► y' ─► Q ─► DQ ─► y        becomes        Gemm ─► y
    """
    for node in list(graph.graph):
        if node.op_type != "QuantizeLinear" or quantized_tensor(node) in plan.activations:
            continue
        source = node.inputs[0]
        for dequantize in list(node.outputs[0].consumers()):
            value = dequantize.outputs[0]
            is_output, name = value.is_graph_output(), value.name
            value.name = f"{name}/removed"
            value.replace_all_uses_with(source, replace_graph_outputs=True)
            graph.graph.remove(dequantize, safe=True)
            if is_output:
                source.name, source.type, source.shape = name, value.type, value.shape
        graph.graph.remove(node, safe=True)
