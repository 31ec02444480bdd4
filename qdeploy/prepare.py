"""FloatModel → FloatModel: the same normal form for every target.

One opset, no functions, no Constant nodes, every node named, constants, factors and BatchNorm folded, shapes inferred.
Tensor names are kept, since ranges, reports and the user's patterns speak of them.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.errors import InputError
from qdeploy.graph import (
    bias_input,
    constant,
    describe,
    is_quantized,
    load_graph,
    name_of,
    save_graph,
    weight_channel_axis,
    weight_of,
)
from qdeploy.model import FloatModel

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 20
"""The opset of every prepared model: what torch.onnx.export writes, with room for all targets."""

FOLDING_ROUNDS = 2
"""What a rewrite leaves constant is folded in the second."""

LOWEST_OPSET = 7
"""Older models cannot be converted."""

OTHER_FLOATS = ("float16", "bfloat16", "float64")

LOWEST_IR_VERSION = 4
"""Before it, every initializer had to be an input too."""


def prepare(model: FloatModel, directory: Path) -> FloatModel:
    """Write the normal form of a model to `directory/model.onnx`.

    Raises:
        InputError: The model is quantized already, or its opset cannot be converted.
    """
    graph = load_graph(model.path)
    refuse_quantized(graph, model.path.name)
    graph = _at_one_opset(graph, model.path)
    _fold(graph)
    _scale_gemms(graph)
    _pool_spatial_means(graph)
    _pad_to_whole_windows(graph)
    _shape_biases_of_products(graph)
    _name_nodes(graph)
    _tidy(graph)
    path = directory / "model.onnx"
    save_graph(graph, path)
    return replace(describe(path, model.name, model.dims), labels=model.labels)


def refuse_quantized(graph: ir.Model, name: str) -> None:
    """Quantizing twice would measure the first quantization as if it were the model.

    Raises:
        InputError: The graph holds quantized operators.
    """
    if is_quantized(graph):
        what = f"{name} is quantized already."
        raise InputError(what, "Look at it with qdeploy inspect, or start from the float model.")


def refuse_other_floats(graph: ir.Model, name: str) -> None:
    """Ranges, scales and the reference of all figures are float32.

    Raises:
        InputError: A weight has another floating-point type.
    """
    for node in graph.graph.all_nodes():
        weight = weight_of(node)
        if weight is not None and weight.dtype.name in OTHER_FLOATS:
            what = f"The weight {name_of(node.inputs[1])!r} of {name} is {weight.dtype.name}, not float32."
            raise InputError(what, "Export it anew in float32.")


def _at_one_opset(graph: ir.Model, path: Path) -> ir.Model:
    """The graph at OPSET; a newer one is left as it is, as its operators may have no older form."""
    opset = graph.opset_imports.get("", 0)
    if opset >= OPSET:
        return graph
    if opset < LOWEST_OPSET:
        raise InputError(f"{path.name} has opset {opset}.", f"Export it with an opset of {LOWEST_OPSET} to {OPSET}.")
    import onnx
    import onnx_ir as ir
    from onnx import version_converter

    try:
        return ir.from_proto(version_converter.convert_version(onnx.load(path), OPSET))
    except Exception as error:  # its classes have no common root
        what = f"{path.name} has opset {opset}, and ONNX cannot convert it to {OPSET}: {error}"
        raise InputError(what, f"Export it anew with opset {OPSET}.") from error


def _fold(graph: ir.Model) -> None:
    """Fold what is constant, and BatchNorm into the operator before it.

    Conv ─► BatchNormalization ─► y        becomes        Conv(W·γ/σ, (b − μ)·γ/σ + β) ─► y

    These are the passes of onnxscript's optimizer, but for the rules that take x + ε for x (of any |ε| up to 1e-8, and
    likewise x·1.00001): where ε guards a division, the quotient would become NaN.
    """
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer, rewriter

    passes.RemoveInitializersFromInputsPass()(graph)
    graph.ir_version = max(graph.ir_version, LOWEST_IR_VERSION)
    passes.InlinePass()(graph)
    for _ in range(FOLDING_ROUNDS):
        optimizer.fold_constants(graph, onnx_shape_inference=True, should_fold=_arranges_constants)
        rewriter.rewrite(graph, pattern_rewrite_rules=_exact_rules())
        _drop_neutral(graph)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    passes.LiftSubgraphInitializersToMainGraphPass()(graph)
    passes.DeduplicateInitializersPass()(graph)
    passes.CommonSubexpressionEliminationPass()(graph)
    passes.OutputFixPass()(graph)
    passes.NameFixPass()(graph)
    passes.ShapeInferencePass()(graph)


NEUTRAL = {"Add": (0, (0, 1)), "Sub": (0, (1,)), "Mul": (1, (0, 1)), "Div": (1, (1,))}
"""Operator → the operand that leaves the other as it is, and where it may stand."""


def _drop_neutral(graph: ir.Model) -> None:
    """Remove sums with zero and products with one: just these, not values near them.

    x ─► Mul(1) ─► y        becomes        x ─► y
    """
    for node in graph.graph.all_nodes():
        neutral, places = NEUTRAL.get(node.op_type, (0, ()))
        for place in places if not node.domain else ():
            operand, kept = constant(node.inputs[place]), node.inputs[1 - place]
            if operand is None or kept is None or operand.size != 1 or operand.item() != neutral:
                continue
            result = node.outputs[0]
            if kept.shape is None or operand.ndim > len(kept.shape) or result.is_graph_output():
                continue
            result.replace_all_uses_with(kept)
            break


def _exact_rules() -> list[Any]:
    """Rewrites that leave every value as it is, but for the rounding of folded constants."""
    from onnxscript.rewriter.rules import common as rules

    return [
        rules.cast_constant_of_shape_rule,
        rules.cast_constant_of_shape_without_value_rule,
        rules.collapse_slice_rule,
        rules.collapse_slice2_rule,
        rules.materialize_reshape_shape_rule,
        rules.min_min_rule,
        rules.max_max_rule,
        rules.min_max_rule,
        rules.max_min_rule,
        rules.successive_relu_rule,
        rules.successive_clip_rule,
        rules.successive_relu_clip_rule,
        rules.successive_clip_relu_rule,
        rules.cast_cast_rule,
        rules.no_op_cast_rule,
        rules.no_op_expand_rule,
        rules.flatten_to_reshape_rule,  # before those of Reshape
        rules.two_reshapes_matmul_reshape_rule,
        rules.one_reshape_matmul_reshape_rule,
        rules.no_op_transpose_rule,
        rules.reshape_reshape_rule,
        rules.slice_split_rule,
        rules.squeeze_reshape_1d_rule,
        rules.transpose_transpose_rule,
        rules.unsqueeze_unsqueeze_rule,
        rules.dropout_zero_rule,
        rules.dropout_inference_rule,
        rules.no_op_dynamic_scatter_nd_rule,
        rules.no_op_static_scatter_nd_rule,
        rules.normalize_pad_format_conv_rule,
        rules.fuse_pad_into_conv_rule,
        rules.fuse_batchnorm_into_conv_rule,
        rules.fuse_batchnorm_into_conv_transpose_rule,
        rules.fuse_batchnorm_into_gemm_rule,
        rules.remove_optional_bias_from_conv_rule,
        rules.remove_optional_bias_from_conv_transpose_rule,
        rules.remove_optional_bias_from_gemm_rule,
    ]


def _arranges_constants(node: ir.Node) -> bool | None:
    """Whether to fold a node however large its constants are; None leaves that to their size.

    PyTorch writes the weights of an LSTM as slices and concatenations of its parameters. To put them in order now makes
    no file larger, and what computes a weight hides it from quantization.
    """
    arranges = node.op_type in ("Concat", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
    return True if arranges and all(constant(value) is not None for value in node.inputs if value) else None


def _scale_gemms(graph: ir.Model) -> None:
    """Fold a Gemm's factors into its constants, and make its bias a vector: integer kernels take it in no other form.

    ORT's quantizer drops beta, and its optimizer is reported to misplace alpha (microsoft/onnxruntime#28130).

    Gemm(x, W, C, alpha, beta)        becomes        Gemm(x, alpha · W, beta · C)
    """
    for node in graph.graph:
        weight = weight_of(node)
        if node.op_type != "Gemm" or weight is None:
            continue
        alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
        if alpha != 1.0:
            _replace_constant(graph, node, 1, weight * np.asarray(alpha, weight.dtype))
            node.attributes.pop("alpha")
        present = len(node.inputs) > 2 and node.inputs[2] is not None
        bias = constant(node.inputs[2]) if bias_input(node) else None
        channels = (weight.shape[weight_channel_axis(node)],)
        if bias is not None and (beta != 1.0 or bias.shape != channels):
            vector = (bias * np.asarray(beta, bias.dtype)).reshape(-1)
            _replace_constant(graph, node, 2, np.broadcast_to(vector, channels).copy())
        if bias is not None or not present:
            node.attributes.pop("beta", None)


def _replace_constant(graph: ir.Model, node: ir.Node, index: int, array: NDArray[Any]) -> None:
    """Give a node another constant, under the old one's name unless another node reads that."""
    import onnx_ir as ir

    old = node.inputs[index]
    assert old is not None
    shared = len(old.uses()) > 1
    name = f"{old.name}/{node.name}" if shared else old.name
    if not shared:
        graph.graph.initializers.pop(name_of(old))
    new = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.graph.register_initializer(new)
    node.replace_input_with(index, new)


def _pool_spatial_means(graph: ir.Model) -> None:
    """Say global average pooling by its name: integer kernels exist for that operator, not for ReduceMean.

    x [N, C, H, W] ─► ReduceMean(axes 2, 3) ─► y     becomes     x ─► GlobalAveragePool (─► Squeeze(2, 3)) ─► y
    """
    import onnx_ir as ir

    for node in list(graph.graph):
        axes = constant(node.inputs[1]) if node.op_type == "ReduceMean" and len(node.inputs) == 2 else None
        source = node.inputs[0] if axes is not None else None
        if axes is None or source is None or source.shape is None or len(source.shape) != 4:
            continue
        if source.dtype != ir.DataType.FLOAT:
            continue
        if sorted(int(axis) % 4 for axis in axes) != [2, 3]:
            continue
        keepdims = node.attributes.get_int("keepdims", 1)
        result = node.outputs[0]
        pooled = ir.node("GlobalAveragePool", [source], name=node.name)
        pooled.outputs[0].type, pooled.outputs[0].shape = result.type, ir.Shape([*source.shape[:2], 1, 1])
        added = [pooled]
        if keepdims:
            last = pooled.outputs[0]
        else:
            pooled.outputs[0].name = f"{result.name}/pooled"
            added.append(ir.node("Squeeze", [pooled.outputs[0], node.inputs[1]], name=f"{node.name}/squeeze"))
            last = added[1].outputs[0]
        last.name, last.type, last.shape = result.name, result.type, result.shape
        result.name = f"{result.name}/replaced"
        graph.graph.insert_before(node, added)
        result.replace_all_uses_with(last, replace_graph_outputs=True)
        graph.graph.remove(node, safe=True)


def _pad_to_whole_windows(graph: ir.Model) -> None:
    """Say by padding how far the last windows of an AveragePool stick out: ORT's integer kernel divides them wrongly.

    AveragePool(ceil_mode=1) of a fixed size     becomes     AveragePool(pads to whole windows, count_include_pad=0)
    """
    import onnx_ir as ir

    for node in graph.graph:
        if node.op_type != "AveragePool" or not node.attributes.get_int("ceil_mode", 0):
            continue
        shape, result = node.inputs[0].shape, node.outputs[0].shape
        kernel = node.attributes.get_ints("kernel_shape")
        sizes, counts = list(shape or ())[2:], list(result or ())[2:]
        pads = list(node.attributes.get_ints("pads", [0] * (2 * len(kernel))))
        strides = node.attributes.get_ints("strides", [1] * len(kernel))
        dilated = any(step != 1 for step in node.attributes.get_ints("dilations", [1] * len(kernel)))
        padded = any(pads) and bool(node.attributes.get_int("count_include_pad", 0))
        named = node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
        if dilated or padded or named or not all(isinstance(n, int) for n in (*sizes, *counts)):
            continue
        reach = [(n - 1) * s + k for n, s, k in zip(counts, strides, kernel, strict=True)]
        inside = zip(reach, sizes, pads[: len(kernel)], strict=True)
        pads[len(kernel) :] = [max(end - size - start, 0) for end, size, start in inside]
        node.attributes.pop("ceil_mode")
        node.attributes["pads"] = ir.AttrInt64s("pads", pads)
        node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 0)


def _shape_biases_of_products(graph: ir.Model) -> None:
    """Put the bias of a MatMul where integer kernels exist for it.

    ORT turns a MatMul and the Add of a vector into a float Gemm, where shapes are fixed, before it looks for quantized
    operators; with a bias of the product's own rank it does not.

    MatMul(x [m, k], W) ─► Add(b [n]) ─► y       becomes        Gemm(x, W, b) ─► y
    MatMul(x [..., m, k], W) ─► Add(b [n])       becomes        MatMul(x, W) ─► Add(b [1, ..., n])
    """
    for node in list(graph.graph):
        place = bias_input(node) if node.op_type == "MatMul" else None
        shape, weight = node.outputs[0].shape, weight_of(node)
        if place is None or shape is None or weight is None:
            continue
        add, index = place
        bias = constant(add.inputs[index])
        if len(shape) == 2 and bias is not None and bias.shape == weight.shape[1:]:
            _fuse_bias(graph, node, add, index)
        elif len(shape) > 2 and bias is not None and bias.ndim < len(shape):
            _replace_constant(graph, add, index, bias.reshape([1] * (len(shape) - 1) + [-1]))


def _fuse_bias(graph: ir.Model, product: ir.Node, add: ir.Node, index: int) -> None:
    import onnx_ir as ir

    gemm = ir.node("Gemm", [*product.inputs, add.inputs[index]], name=product.name)
    written, result = gemm.outputs[0], add.outputs[0]
    written.name, written.type, written.shape = result.name, result.type, result.shape
    result.name = f"{result.name}/replaced"
    graph.graph.insert_before(add, gemm)
    result.replace_all_uses_with(written, replace_graph_outputs=True)
    graph.graph.remove([add, product], safe=True)


def _name_nodes(graph: ir.Model) -> None:
    """Give every node a name of its own; names that are there stay."""
    taken = {node.name for node in graph.graph.all_nodes()}
    seen: set[str] = set()
    for index, node in enumerate(graph.graph.all_nodes()):
        if not node.name or node.name in seen:
            node.name = next(name for i in count(index) if (name := f"{node.op_type}_{i}") not in taken)
            taken.add(node.name)
        seen.add(node.name)


def _tidy(graph: ir.Model) -> None:
    """Drop what nothing reads, and the stack traces and file paths of exporters: equal models give equal bytes."""
    import onnx_ir.passes.common as passes

    passes.RemoveUnusedNodesPass()(graph)
    for name in sorted(graph.graph.initializers):  # passes that replace one move it to the end
        graph.graph.initializers[name] = graph.graph.initializers.pop(name)
    passes.ClearMetadataAndDocStringPass()(graph)
    graph.producer_name = "qdeploy"
    graph.producer_version = None
    graph.doc_string = None
    graph.metadata_props.clear()
    graph.graph.name = "model"
