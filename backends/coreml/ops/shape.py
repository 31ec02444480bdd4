"""Operators that arrange, select and repeat values, and those that compute shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.backends.coreml.call import INT32, Call, Handler, is_static
from qdeploy.backends.coreml.ops.convolution import interleaved
from qdeploy.graph import constant

if TYPE_CHECKING:
    import onnx_ir as ir


def dimension(mb: Any, x: Any, axis: int) -> Any:
    """One dimension of a variable: a number, or a MIL vector of one value if it is dynamic."""
    size = x.shape[axis]
    if is_static([size]):
        return np.int32(size)
    return mb.slice_by_size(x=mb.shape(x=x), begin=np.array([axis], np.int32), size=np.array([1], np.int32))


def vector(mb: Any, parts: Sequence[Any]) -> Any:
    """A shape of numbers and MIL vectors of one value."""
    if is_static(parts):
        return np.array(parts, np.int32)
    values = [mb.const(val=np.array([part], np.int32)) if is_static([part]) else part for part in parts]
    return mb.concat(values=values, axis=np.int32(0)) if len(values) > 1 else values[0]


def reshaped(mb: Any, x: Any, shape: Sequence[Any]) -> Any:
    """A variable in another shape, of numbers and dynamic dimensions; one dynamic dimension alone is left to MIL."""
    dynamic = [index for index, part in enumerate(shape) if not is_static([part])]
    if len(dynamic) == 1 and -1 not in [part for part in shape if is_static([part])]:
        shape = [-1 if index in dynamic else part for index, part in enumerate(shape)]
    return mb.reshape(x=x, shape=vector(mb, shape))


def reshape(call: Call) -> Any:
    """To constant sizes, of which 0 stands for the input's own, or to computed ones."""
    mb, x = call.mb, call.variable(0)
    wanted = call.constant(1)
    if wanted is None:
        return mb.reshape(x=x, shape=call.var(1))
    if not wanted.size:
        return mb.squeeze(x=x, axes=np.arange(call.rank(0), dtype=np.int32)) if call.rank(0) else x
    return reshaped(mb, x, [int(n) if n else dimension(mb, x, axis) for axis, n in enumerate(wanted)])


def reshape_objections(node: ir.Node) -> Iterator[str]:
    """With allowzero=1 a zero is an empty dimension, which Core ML does not have."""
    wanted = constant(node.inputs[1])
    if node.attributes.get_int("allowzero", 0) and wanted is not None and 0 in wanted:
        yield "allowzero=1 with a dimension of 0"


def flatten(call: Call) -> Any:
    """To a matrix, split before an axis."""
    mb, x = call.mb, call.variable(0)
    axis = call.integer("axis", 1)
    axis += call.rank(0) if axis < 0 else 0
    before, after = call.shape(0)[:axis], call.shape(0)[axis:]
    if is_static(after):
        return mb.reshape(x=x, shape=np.array([-1, np.prod(after, dtype=np.int64)], np.int32))
    if is_static(before):
        return mb.reshape(x=x, shape=np.array([np.prod(before, dtype=np.int64), -1], np.int32))
    return mb.flatten2d(x=x, axis=np.int32(axis))


def transpose(call: Call) -> Any:
    """Axes in another order, reversed by default."""
    order = call.integers("perm", list(reversed(range(call.rank(0)))))
    return call.mb.transpose(x=call.variable(0), perm=np.array(order, np.int32))


def concat(call: Call) -> Any:
    """Along one axis."""
    values = call.variables()
    return call.mb.concat(values=values, axis=np.int32(call.integer("axis", 0))) if len(values) > 1 else values[0]


def unsqueeze(call: Call) -> Any:
    """New axes of size 1."""
    return call.mb.expand_dims(x=call.variable(0), axes=call.known(1).astype(np.int32).reshape(-1))


def squeeze(call: Call) -> Any:
    """Without some axes of size 1, or without all of them."""
    x = call.variable(0)
    if not call.has(1):
        axes = np.array([axis for axis, size in enumerate(call.shape(0)) if is_static([size]) and size == 1], np.int32)
        return call.mb.squeeze(x=x, axes=axes) if axes.size else x
    return call.mb.squeeze(x=x, axes=call.known(1).astype(np.int32).reshape(-1))


def expand(call: Call) -> Any:
    """Broadcast against a shape: by a product with ones, or for flags by an `or` with falsehoods."""
    mb, x = call.mb, call.variable(0)
    shape = call.constant(1)
    wanted = list(map(int, shape)) if shape is not None else None
    if (
        wanted is not None
        and is_static(x.shape)
        and np.broadcast_shapes(tuple(wanted), tuple(x.shape)) == tuple(x.shape)
    ):
        return x
    target = np.array(wanted, np.int32) if wanted is not None else call.var(1)
    kind = call.kind(0)
    if kind == "bool":
        return mb.logical_or(x=x, y=mb.fill(shape=target, value=np.bool_(False)))
    return mb.mul(x=x, y=mb.fill(shape=target, value=np.float32(1) if kind == "float" else np.int32(1)))


def slice_values(call: Call) -> Any:
    """From starts to ends in steps, along some axes."""
    mb, x, rank = call.mb, call.variable(0), call.rank(0)
    count = call.shape(1)[0]
    axes = [int(a) % rank for a in call.known(3)] if call.has(3) else list(range(count))
    steps = [int(s) for s in call.known(4)] if call.has(4) else [1] * count
    starts, ends = call.constant(1), call.constant(2)
    stride = np.ones(rank, np.int32)
    stride[axes] = steps
    begin_mask, end_mask = (np.array([axis not in axes for axis in range(rank)]) for _ in range(2))
    begin, end = [0] * rank, [0] * rank  # type: list[Any], list[Any]
    for place, (axis, step) in enumerate(zip(axes, steps, strict=True)):
        if starts is not None:
            begin[axis], begin_mask[axis] = _start(int(starts[place]), step, x.shape[axis])
        else:
            begin[axis] = _element(mb, call.var(1), place)
        if ends is not None:
            end[axis], end_mask[axis] = _end(int(ends[place]), step, x.shape[axis])
        else:
            end[axis] = _element(mb, call.var(2), place)
    masks = {"begin_mask": begin_mask, "end_mask": end_mask}
    return mb.slice_by_index(x=x, begin=vector(mb, begin), end=vector(mb, end), stride=stride, **masks)


def _element(mb: Any, values: Any, place: int) -> Any:
    return mb.slice_by_size(x=values, begin=np.array([place], np.int32), size=np.array([1], np.int32))


def _start(start: int, step: int, size: Any) -> tuple[int, bool]:
    """Where a slice begins, and whether that is simply the first value in its direction."""
    if is_static([size]):
        return slice(start, None, step).indices(int(size))[0], False
    beyond = start >= INT32.max if step < 0 else start <= INT32.min
    return (0, True) if beyond or (step < 0 and start == -1) else (start, False)


def _end(end: int, step: int, size: Any) -> tuple[int, bool]:
    """Where a slice ends, and whether that is simply behind the last value in its direction."""
    if is_static([size]):
        stop = slice(None, end, step).indices(int(size))[1]
        return (0, True) if stop < 0 else (stop, False)
    beyond = end <= INT32.min + 1 if step < 0 else end >= INT32.max
    return (0, True) if beyond else (end, False)


def slice_objections(node: ir.Node) -> Iterator[str]:
    """Computed limits with negative steps need the size of the axis, and zero-length results do not exist."""
    steps = constant(node.inputs[4]) if len(node.inputs) > 4 else None
    computed = any(constant(value) is None for value in node.inputs[1:3])
    if computed and steps is not None and np.any(steps < 0):
        yield "negative steps with computed starts or ends"


def counted_from_the_front(indices: NDArray[Any], size: Any) -> NDArray[np.int32]:
    """Constant indices without negative ones, where the size is known."""
    return np.where(indices < 0, indices + size, indices).astype(np.int32) if is_static([size]) else indices


def _indices(call: Call, axis: int) -> Any:
    """Input 1 as indices along an axis of input 0."""
    array = call.constant(1)
    return call.var(1) if array is None else counted_from_the_front(array, call.shape(0)[axis])


def _never_negative(call: Call, axis: int) -> Any:
    """Input 1 as indices from the front: what MIL takes along an axis."""
    mb, indices = call.mb, _indices(call, axis)
    if isinstance(indices, np.ndarray) and not np.any(indices < 0):
        return indices
    from_end = mb.add(x=indices, y=dimension(mb, call.variable(0), axis))
    return mb.select(cond=mb.less(x=indices, y=np.int32(0)), a=from_end, b=indices)


def _of_numbers(call: Call, gather: Callable[[Any], Any]) -> Any:
    """What a gathering operation makes of input 0; flags are gathered as numbers."""
    if call.kind(0) != "bool":
        return gather(call.var(0))
    return call.mb.cast(x=gather(call.mb.cast(x=call.variable(0), dtype="int32")), dtype="bool")


def gather(call: Call) -> Any:
    """Slices of one axis, by indices."""
    axis = call.integer("axis", 0) % call.rank(0)
    indices = _indices(call, axis)
    take = partial(call.mb.gather, indices=indices, axis=np.int32(axis), validate_indices=False)
    return _of_numbers(call, lambda x: take(x=x))


def gather_elements(call: Call) -> Any:
    """Values along one axis, by an index for each."""
    axis = call.integer("axis", 0) % call.rank(0)
    indices = _never_negative(call, axis)
    take = partial(call.mb.gather_along_axis, indices=indices, axis=np.int32(axis), validate_indices=False)
    return _of_numbers(call, lambda x: take(x=x))


def gather_nd(call: Call) -> Any:
    """Slices by tuples of indices."""
    batch = np.int32(call.integer("batch_dims", 0))
    take = partial(call.mb.gather_nd, indices=call.variable(1), batch_dims=batch, validate_indices=False)
    return _of_numbers(call, lambda x: take(x=x))


SCATTERS = {"none": "update", "add": "add", "mul": "mul", "max": "max", "min": "min"}
"""ONNX's reduction → MIL's mode."""


def scatter_elements(call: Call) -> Any:
    """Values put along one axis, by an index for each."""
    axis = call.integer("axis", 0) % call.rank(0)
    return call.mb.scatter_along_axis(
        data=call.var(0),
        indices=_never_negative(call, axis),
        updates=call.var(2),
        axis=np.int32(axis),
        mode=SCATTERS[call.text("reduction", "none")],
        validate_indices=False,
    )


def scatter_nd(call: Call) -> Any:
    """Slices put where tuples of indices say."""
    mode = SCATTERS[call.text("reduction", "none")]
    data, indices, updates = call.variables()
    return call.mb.scatter_nd(data=data, indices=indices, updates=updates, mode=mode, validate_indices=False)


def shape(call: Call) -> Any:
    """Dimensions from one axis to another."""
    rank = call.rank(0)
    start, end, _ = slice(call.integer("start", 0), call.integer("end", rank), 1).indices(rank)
    dims = call.shape(0)[start:end]
    if is_static(dims):
        return np.array(dims, np.int32)
    whole = call.mb.shape(x=call.var(0))
    sizes = (np.array([start], np.int32), np.array([end - start], np.int32))
    return whole if end - start == rank else call.mb.slice_by_size(x=whole, begin=sizes[0], size=sizes[1])


def size(call: Call) -> Any:
    """The number of values."""
    if is_static(call.shape(0)):
        return np.array(np.prod(call.shape(0)), np.int32)
    return call.mb.reduce_prod(x=call.mb.shape(x=call.var(0)), axes=np.array([0], np.int32), keep_dims=False)


def value_range(call: Call) -> Any:
    """Numbers from a start to before a limit."""
    start, limit, delta = (call.var(i) for i in range(3))
    return call.mb.range_1d(start=start, end=limit, step=delta)


def split(call: Call) -> Any:
    """Parts along one axis."""
    axis, x = call.integer("axis", 0), call.variable(0)
    if call.has(1):
        sizes = call.known(1).astype(np.int32)
    else:
        total, parts = int(call.shape(0)[axis]), call.integer("num_outputs", len(call.node.outputs))
        each = -(-total // parts)
        sizes = np.array([each] * (parts - 1) + [total - each * (parts - 1)], np.int32)
    if len(sizes) == 1:
        return (x,)
    return call.mb.split(x=x, split_sizes=sizes, axis=np.int32(axis))


def split_objections(node: ir.Node) -> Iterator[str]:
    """Equal parts of a dynamic axis are not known beforehand."""
    value, axis = node.inputs[0], node.attributes.get_int("axis", 0)
    given = len(node.inputs) > 1 and node.inputs[1] is not None
    if not given and value is not None and value.shape is not None and not isinstance(value.shape[axis], int):
        yield "equal parts of an axis of dynamic size"


def tile(call: Call) -> Any:
    """Repeated along each axis."""
    return call.mb.tile(x=call.variable(0), reps=call.var(1))


PADS = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}
"""ONNX's mode → MIL's."""


def pad(call: Call) -> Any:
    """Values before and behind; integers and flags are padded as floats."""
    mb, rank, kind = call.mb, call.rank(0), call.kind(0)
    pads, axes = call.known(1), call.known(3) % rank if call.has(3) else np.arange(rank)
    amounts = np.zeros((2, rank), np.int32)
    amounts[:, axes.astype(int)] = pads.reshape(2, -1)
    first = next((axis for axis in range(rank) if amounts[:, axis].any()), rank - 1)
    value = np.float32(call.known(2).item()) if call.has(2) else np.float32(0)
    x = call.variable(0) if kind == "float" else mb.cast(x=call.variable(0), dtype="fp32")
    mode = PADS[call.text("mode", "constant")]
    padded = mb.pad(x=x, pad=interleaved(amounts[:, first:].ravel().tolist()), mode=mode, constant_val=value)
    return padded if kind == "float" else mb.cast(x=padded, dtype="int32" if kind == "int" else "bool")


def pad_objections(node: ir.Node) -> Iterator[str]:
    """MIL pads, and does not crop or wrap around."""
    pads, mode = constant(node.inputs[1]), node.attributes.get_string("mode", "constant")
    if mode not in PADS:
        yield f"mode={mode}"
    if pads is not None and np.any(pads < 0):
        yield "negative pads (use a Slice)"
    if mode != "constant" and pads is not None and np.count_nonzero(pads.reshape(2, -1).any(axis=0)) > 2:
        yield f"mode={mode} along more than two axes"


def constant_of_shape(call: Call) -> Any:
    """One value everywhere."""
    given = call.node.attributes.get("value")
    value = np.asarray(given.as_tensor().numpy()).reshape(()) if given is not None else np.float32(0)
    kinds = {"f": np.float32, "b": np.bool_}
    scalar = kinds.get(value.dtype.kind, np.int32)(value)
    return call.mb.fill(shape=call.var(0), value=scalar)


def triangle(call: Call) -> Any:
    """The upper or lower triangle of matrices, zeros elsewhere: a choice by the distance from the diagonal."""
    mb, x = call.mb, call.variable(0)
    k = int(call.known(1).item()) if call.has(1) else 0
    upper = bool(call.integer("upper", 1))
    rows, columns = x.shape[-2:]
    zero = {"float": np.float32(0), "int": np.int32(0), "bool": np.bool_(False)}[call.kind(0)]
    if is_static([rows, columns]):
        distance = np.arange(columns)[None, :] - np.arange(rows)[:, None]
        return mb.select(cond=distance >= k if upper else distance <= k, a=x, b=zero)
    compare = mb.greater_equal if upper else mb.less_equal
    below, across = (_places(mb, dimension(mb, x, axis), other) for axis, other in ((-2, 1), (-1, 0)))
    return mb.select(cond=compare(x=mb.sub(x=across, y=below), y=np.int32(k)), a=x, b=zero)


def _places(mb: Any, count: Any, other: int) -> Any:
    """0, 1, 2, … along one of two axes."""
    end = np.int32(count) if is_static([count]) else mb.squeeze(x=count, axes=np.array([0], np.int32))
    numbers = mb.range_1d(start=np.int32(0), end=end, step=np.int32(1))
    return mb.expand_dims(x=numbers, axes=np.array([other], np.int32))


def depth_to_space(call: Call) -> Any:
    """Channels become blocks of pixels; their order among the channels is DCR or CRD."""
    block = np.int32(call.integer("blocksize", 1))
    if call.text("mode", "DCR") == "CRD":
        return call.mb.pixel_shuffle(x=call.var(0), upscale_factor=block)
    return call.mb.depth_to_space(x=call.var(0), block_size=block)


def space_to_depth(call: Call) -> Any:
    """Blocks of pixels become channels; their order among the channels is DCR or CRD."""
    if call.text("mode", "DCR") == "CRD":
        return call.mb.pixel_unshuffle(x=call.var(0), downscale_factor=np.uint32(call.integer("blocksize", 1)))
    return call.mb.space_to_depth(x=call.var(0), block_size=np.int32(call.integer("blocksize", 1)))


def one_hot(call: Call) -> Any:
    """One value where the index is, another elsewhere; negative indices count from the end."""
    mb, depth = call.mb, np.int32(call.known(1).item())
    off, on = call.known(2)
    indices = call.var(0) if call.kind(0) == "int" else mb.cast(x=call.var(0), dtype="int32")
    indices = mb.select(cond=mb.less(x=indices, y=np.int32(0)), a=mb.add(x=indices, y=depth), b=indices)
    axis = np.int32(call.integer("axis", -1))
    return mb.one_hot(indices=indices, one_hot_vector_size=depth, axis=axis, on_value=on, off_value=off)


def _values_only(name: str) -> Callable[[ir.Node], Iterator[str]]:
    """An attribute whose values are those of a table."""

    def objections(node: ir.Node) -> Iterator[str]:
        value = node.attributes.get_string(name, "none")
        if value not in SCATTERS:
            yield f"{name}={value}"

    return objections


HANDLERS = {
    "Reshape": Handler(reshape, ("allowzero",), objections=reshape_objections, shapes=(1,)),
    "Flatten": Handler(flatten, ("axis",)),
    "Transpose": Handler(transpose, ("perm",)),
    "Concat": Handler(concat, ("axis",)),
    "Unsqueeze": Handler(unsqueeze, (), (1,)),
    "Squeeze": Handler(squeeze, (), (1,)),
    "Expand": Handler(expand, shapes=(1,)),
    "Slice": Handler(slice_values, (), (3, 4), slice_objections),
    "Gather": Handler(gather, ("axis",)),
    "GatherElements": Handler(gather_elements, ("axis",)),
    "GatherND": Handler(gather_nd, ("batch_dims",)),
    "ScatterElements": Handler(scatter_elements, ("axis", "reduction"), objections=_values_only("reduction")),
    "ScatterND": Handler(scatter_nd, ("reduction",), objections=_values_only("reduction")),
    "Shape": Handler(shape, ("start", "end")),
    "Size": Handler(size),
    "Range": Handler(value_range),
    "Split": Handler(split, ("axis", "num_outputs"), (1,), split_objections, outputs=64),
    "Tile": Handler(tile),
    "Pad": Handler(pad, ("mode",), (1, 2, 3), pad_objections),
    "ConstantOfShape": Handler(constant_of_shape, ("value",), shapes=(0,)),
    "Trilu": Handler(triangle, ("upper",), (1,)),
    "DepthToSpace": Handler(depth_to_space, ("blocksize", "mode")),
    "SpaceToDepth": Handler(space_to_depth, ("blocksize", "mode")),
    "OneHot": Handler(one_hot, ("axis",), (1, 2)),
}
