"""A graph in float16 throughout, for targets that read precision off the graph; inputs and outputs keep their types.

Every float32 value becomes float16, but for those that an operator of ONNX takes as float32 alone (Range, the scales
of Resize): they stand between Casts. Constants beyond float16's range are masks and become its largest value; those too
small for it guard divisions and become its smallest. ONNX Runtime's converter leaves out operators by a list of its
own, which puts Casts between a DequantizeLinear and its operator, and moves constants of 10,000 and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.errors import InputError
from qdeploy.model import FloatModel, QuantizedModel
from qdeploy.plan import kept_nodes
from qdeploy.quantize.rewrite import graph_of, tidy
from qdeploy.quantize.write import write
from qdeploy.scheme import QuantContract

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

LIMITS = np.finfo(np.float16)

TYPED_BY_ATTRIBUTE = frozenset({"Cast", "Constant", "ConstantOfShape"})
"""Operators that write the type which an attribute names."""


def to_float16(model: FloatModel, contract: QuantContract, directory: Path, keep: Sequence[str] = ()) -> QuantizedModel:
    """Write a model that computes in float16 to `directory/model.onnx`, and check it.

    Args:
        model: A prepared model.
        contract: The target's rules.
        directory: Where to write.
        keep: Nodes that compute in float32: "first", "last", or patterns of node or weight names (`*` and `?`).

    Raises:
        InputError: A keep pattern matches nothing.
    """
    graph = questions.load_graph(model.path)
    cast_graph(graph, kept_nodes(graph, keep).keys())
    return write(graph, model, contract, (), directory)


def cast_quantized(model: QuantizedModel, directory: Path) -> QuantizedModel:
    """Write a QDQ model with everything but its integers in float16 to `directory/model.onnx`, and check it.

    Raises:
        InputError: A scale has no float16, which a model of our own planning never has.
    """
    graph = questions.load_graph(model.path)
    _refuse_lost_scales(graph)
    cast_graph(graph, frozenset())
    return write(graph, model.float_model, model.contract, model.quantized_nodes, directory)


def cast_graph(graph: ir.Model, exact: AbstractSet[str]) -> None:
    """Cast a graph in place.

    x ─► Conv(W) ─► y        becomes        x ─► Cast ─► Conv(W16) ─► Cast ─► y

    Args:
        graph: A float graph, or one with QDQ pairs.
        exact: Names of the nodes that stay float32.
    """
    import onnx_ir.passes.common as passes

    passes.ShapeInferencePass()(graph)  # quantizers leave out the types of what they insert
    constants = {id(half): value for value in _float_constants(graph) for half in [_halved(value)]}
    for value in graph.graph.inputs:
        if _is_float(value) and not value.is_initializer():
            _cast_behind(value, before=graph.graph[0] if len(graph.graph) else None)
    for each in graph.graphs():
        for value in each.inputs if each is not graph.graph else ():
            if _is_float(value):
                _retype(value, half=True)
    for node in list(graph.graph.all_nodes()):
        _cast_node(node, constants, _kept_slots(node, graph, exact=str(node.name) in exact))
    _restore_outputs(graph)
    tidy(graph)


def _refuse_lost_scales(graph: ir.Model) -> None:
    for node in graph.graph.all_nodes():
        scale = questions.constant(node.inputs[1]) if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None
        if scale is not None and scale.dtype == np.float32 and not np.array_equal(_half(scale), scale):
            what = f"{node.name} has scales that float16 does not hold (from {scale.min():.3g} to {scale.max():.3g})."
            raise InputError(what, "Choose int8, whose scales are float32, or quantize the model anew for float16.")


def _float_constants(graph: ir.Model) -> list[ir.Value]:
    return [v for each in graph.graphs() for v in each.initializers.values() if _is_float(v) and v.const_value]


def _halved(value: ir.Value) -> ir.Value:
    """A float16 constant that takes the place of a float32 one."""
    import onnx_ir as ir

    array, name = questions.constant(value), f"{value.name}/float16"
    assert array is not None
    assert value.graph is not None
    half = ir.val(name, const_value=ir.tensor(_half(array), name=name))
    value.graph.register_initializer(half)
    value.replace_all_uses_with(half)
    return half


def _half(array: NDArray[Any]) -> NDArray[np.float16]:
    limited = np.clip(array, float(LIMITS.min), float(LIMITS.max)).astype(np.float16)
    smallest = np.copysign(LIMITS.smallest_subnormal, array).astype(np.float16)
    half: NDArray[np.float16] = np.where((limited == 0) & (array != 0), smallest, limited)
    return half


def _is_float(value: ir.Value | None) -> bool:
    import onnx_ir as ir

    return value is not None and value.dtype == ir.DataType.FLOAT


def _retype(value: ir.Value, *, half: bool) -> None:
    import onnx_ir as ir

    value.dtype = ir.DataType.FLOAT16 if half else ir.DataType.FLOAT


def _cast(value: ir.Value, *, half: bool) -> ir.Node:
    """A Cast that reads a value; it stands in no graph yet."""
    import onnx_ir as ir

    kind = ir.DataType.FLOAT16 if half else ir.DataType.FLOAT
    cast = ir.node("Cast", [value], {"to": kind}, name=f"{value.name}/{'float16' if half else 'float32'}")
    cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = cast.name, value.shape, ir.TensorType(kind)
    return cast


def _cast_behind(value: ir.Value, before: ir.Node | None = None) -> None:
    """Give all readers of a float32 value a float16 one."""
    if not value.uses():
        return
    cast = _cast(value, half=True)
    readers = list(value.uses())
    if before is not None:
        graph_of(before).insert_before(before, cast)
    else:
        producer = value.producer()
        assert producer is not None
        graph_of(producer).insert_after(producer, cast)
    for use in readers:
        if use.node is not cast:
            use.node.replace_input_with(use.idx, cast.outputs[0])


def _kept_slots(node: ir.Node, graph: ir.Model, *, exact: bool) -> tuple[frozenset[int], frozenset[int]]:
    """The inputs and outputs of a node that stay float32, since it takes nothing else or is kept so."""
    from onnx import defs

    everything = frozenset(range(len(node.inputs))), frozenset(range(len(node.outputs)))
    opset = graph.opset_imports.get(node.domain, 1)
    if exact or not defs.has(node.op_type, node.domain) or node.op_type == "Cast":
        return everything if node.op_type != "Cast" else (frozenset(), frozenset())
    schema = defs.get_schema(node.op_type, opset, node.domain)
    allowed = {each.type_param_str: each.allowed_type_strs for each in schema.type_constraints}
    inputs = (i for i in range(len(node.inputs)) if not _takes_half(schema.inputs, i, allowed))
    outputs = frozenset(i for i in range(len(node.outputs)) if not _takes_half(schema.outputs, i, allowed))
    reads_float = any(questions.is_real(value) for value in node.inputs)
    has_graphs = any(attribute.type.name.startswith("GRAPH") for attribute in node.attributes.values())
    if not (reads_float or has_graphs or node.op_type in TYPED_BY_ATTRIBUTE):
        outputs = everything[1]  # what draws random numbers and the like
    return frozenset(inputs), outputs


def _takes_half(
    formals: Sequence[onnx.defs.OpSchema.FormalParameter], index: int, allowed: dict[str, Sequence[str]]
) -> bool:
    name = formals[min(index, len(formals) - 1)].type_str
    return "tensor(float16)" in allowed.get(name, [name])


def _cast_node(node: ir.Node, constants: dict[int, ir.Value], kept: tuple[frozenset[int], frozenset[int]]) -> None:
    import onnx_ir as ir

    for index in kept[0]:
        value = node.inputs[index]
        if value is None or value.dtype != ir.DataType.FLOAT16:
            continue
        exact = constants.get(id(value))
        if exact is None:
            cast = _cast(value, half=False)
            cast.name = cast.outputs[0].name = f"{node.name}/input{index}"
            graph_of(node).insert_before(node, cast)
            exact = cast.outputs[0]
        node.replace_input_with(index, exact)
    _retype_attribute(node)
    for index, value in enumerate(node.outputs):
        if not _is_float(value):
            continue
        if index in kept[1]:
            _cast_behind(value)
        else:
            _retype(value, half=True)


def _retype_attribute(node: ir.Node) -> None:
    """Let an operator whose type is an attribute write float16."""
    import onnx_ir as ir

    if node.op_type == "Cast" and node.attributes.get_int("to", 0) == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
    elif node.op_type in ("Constant", "ConstantOfShape"):
        value = node.attributes.get("value")
        array = value.as_tensor().numpy() if value is not None else np.zeros(1, np.float32)
        if array.dtype == np.float32:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(_half(array)))


def _restore_outputs(graph: ir.Model) -> None:
    """Outputs of the model in float32 again, under their own names."""
    import onnx_ir as ir

    for index, value in enumerate(graph.graph.outputs):
        if value.dtype != ir.DataType.FLOAT16:
            continue
        name, value.name = value.name, f"{value.name}/float16"
        cast = _cast(value, half=False)
        cast.outputs[0].name = name
        graph.graph.append(cast)
        graph.graph.outputs[index] = cast.outputs[0]
