"""Normalizations. Shifts and factors are constants; in a quantized graph they may be stored as integers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.backends.coreml.call import Call, Handler, is_static

if TYPE_CHECKING:
    import onnx_ir as ir


def _affine(call: Call) -> dict[str, Any]:
    """Factor and shift, where they are given."""
    return {name: call.weight(index) for index, name in ((1, "gamma"), (2, "beta")) if call.has(index)}


def _epsilon(call: Call) -> np.float32:
    return np.float32(call.number("epsilon", 1e-5))


def _last_axes(call: Call) -> NDArray[np.int32]:
    rank = call.rank(0)
    return np.arange(call.integer("axis", -1) % rank, rank, dtype=np.int32)


def layer_norm(call: Call) -> Any:
    """Over the last axes; the mean and the inverse deviation, if someone reads them, are computed beside it."""
    mb, x, axes, epsilon = call.mb, call.var(0), _last_axes(call), _epsilon(call)
    normalized = tuple(call.shape(0)[axes[0] :])
    if all(tuple(call.shape(i)) == normalized for i in (1, 2) if call.has(i)):
        y = mb.layer_norm(x=x, axes=axes, epsilon=epsilon, **_affine(call))
    else:  # a factor that broadcasts
        y = mb.mul(x=mb.layer_norm(x=x, axes=axes, epsilon=epsilon), y=call.var(1))
        y = mb.add(x=y, y=call.var(2)) if call.has(2) else y
    if len(call.node.outputs) == 1:
        return y
    mean = mb.reduce_mean(x=x, axes=axes, keep_dims=True)
    variance = mb.reduce_mean(x=mb.square(x=mb.sub(x=x, y=mean)), axes=axes, keep_dims=True)
    return y, mean, mb.rsqrt(x=variance, epsilon=epsilon)


def rms_norm(call: Call) -> Any:
    """X / √(mean(x²) + ε), times a factor."""
    mb, x = call.mb, call.var(0)
    square = mb.reduce_mean(x=mb.square(x=x), axes=_last_axes(call), keep_dims=True)
    return mb.mul(x=mb.mul(x=x, y=mb.rsqrt(x=square, epsilon=_epsilon(call))), y=call.var(1))


def instance_norm(call: Call) -> Any:
    """Each channel of each sample by itself."""
    return call.mb.instance_norm(x=call.var(0), epsilon=_epsilon(call), **_affine(call))


def instance_objections(node: ir.Node) -> Iterator[str]:
    """MIL has it in one and two dimensions."""
    value = node.inputs[0]
    if value is not None and value.shape is not None and not 3 <= len(value.shape) <= 4:
        yield f"an input of {len(value.shape)} dimensions (3 and 4 are taken)"


def batch_norm(call: Call) -> Any:
    """With the statistics of training, each channel by a factor and a shift."""
    if call.integer("training_mode", 0):
        return batch_norm_in_training(call)
    mb, (scale, shift, mean, variance) = call.mb, [call.known(i).astype(np.float64) for i in range(1, 5)]
    wide = [-1, *[1] * (call.rank(0) - 2)]
    factor = scale / np.sqrt(variance + float(_epsilon(call)))
    if call.rank(0) < 3:
        y = mb.mul(x=call.var(0), y=factor.astype(np.float32).reshape(wide))
        return mb.add(x=y, y=(shift - mean * factor).astype(np.float32).reshape(wide))
    names = ("gamma", "beta", "mean", "variance")
    constants = {name: call.known(i).astype(np.float32) for i, name in enumerate(names, 1)}
    return mb.batch_norm(x=call.var(0), epsilon=_epsilon(call), **constants)


def batch_norm_in_training(call: Call) -> Any:
    """With the statistics of this batch, as layers stay that a model freezes in training mode; and their running mean.

    y = (x − mean) / √(variance + ε) · scale + shift; running' = running · momentum + batch's · (1 − momentum)
    """
    mb, x, momentum = call.mb, call.var(0), np.float32(call.number("momentum", 0.9))
    axes = np.array([axis for axis in range(call.rank(0)) if axis != 1], np.int32)
    wide = [-1, *[1] * (call.rank(0) - 2)]
    mean = mb.reduce_mean(x=x, axes=axes, keep_dims=True)
    centred = mb.sub(x=x, y=mean)
    variance = mb.reduce_mean(x=mb.square(x=centred), axes=axes, keep_dims=True)
    y = mb.mul(x=mb.mul(x=centred, y=mb.rsqrt(x=variance, epsilon=_epsilon(call))), y=call.known(1).reshape(wide))
    y = mb.add(x=y, y=call.known(2).reshape(wide))
    if len(call.node.outputs) == 1:
        return y
    running = []
    for index, batch in ((3, mean), (4, variance)):
        own = mb.mul(x=mb.squeeze(x=batch, axes=axes), y=np.float32(1) - momentum)
        running.append(mb.add(x=own, y=call.known(index) * momentum))
    return y, *running


def group_norm(call: Call) -> Any:
    """Each group of channels of each sample by itself, then a factor and a shift for each channel.

    x [N, C, ...] ─► reshape [N, G, -1] ─► layer_norm ─► reshape [N, C, ...] ─► mul ─► add
    """
    mb, x, groups = call.mb, call.var(0), call.integer("num_groups", 1)
    dims = call.shape(0)
    parts = mb.reshape(x=x, shape=np.array([-1, groups, np.prod(dims[1:], dtype=np.int64) // groups], np.int32))
    normal = mb.layer_norm(x=parts, axes=np.array([2], np.int32), epsilon=_epsilon(call))
    whole = mb.reshape(x=normal, shape=np.array([-1, *dims[1:]], np.int32))
    wide = [-1, *[1] * (len(dims) - 2)]
    y = mb.mul(x=whole, y=call.known(1).reshape(wide))
    return mb.add(x=y, y=call.known(2).reshape(wide))


def group_norm_objections(node: ir.Node) -> Iterator[str]:
    """The batch alone may be dynamic."""
    value = node.inputs[0]
    if value is not None and value.shape is not None and not is_static(list(value.shape)[1:]):
        yield "an input with dynamic dimensions besides the batch"
    if node.version is not None and node.version < 21:
        yield "one factor a group, as before opset 21"


def lp_norm(call: Call) -> Any:
    """Divided by the length along one axis; what has no length stays zero."""
    mb, x = call.mb, call.var(0)
    reduce = mb.reduce_l1_norm if call.integer("p", 2) == 1 else mb.reduce_l2_norm
    length = reduce(x=x, axes=np.array([call.integer("axis", -1)], np.int32), keep_dims=True)
    return mb.real_div(x=x, y=mb.select(cond=mb.equal(x=length, y=np.float32(0)), a=np.float32(1), b=length))


def local_response_norm(call: Call) -> Any:
    """Each value by those of the neighbouring channels."""
    return call.mb.local_response_norm(
        x=call.var(0),
        size=np.int32(call.integer("size", 1)),
        alpha=np.float32(call.number("alpha", 1e-4)),
        beta=np.float32(call.number("beta", 0.75)),
        k=np.float32(call.number("bias", 1.0)),
    )


HANDLERS = {
    "LayerNormalization": Handler(layer_norm, ("axis", "epsilon", "stash_type"), (1, 2), outputs=3),
    "RMSNormalization": Handler(rms_norm, ("axis", "epsilon", "stash_type"), (1,)),
    "InstanceNormalization": Handler(instance_norm, ("epsilon",), (1, 2), instance_objections),
    "BatchNormalization": Handler(batch_norm, ("epsilon", "momentum", "training_mode"), (1, 2, 3, 4), outputs=3),
    "GroupNormalization": Handler(group_norm, ("epsilon", "num_groups", "stash_type"), (1, 2), group_norm_objections),
    "LpNormalization": Handler(lp_norm, ("axis", "p")),
    "LRN": Handler(local_response_norm, ("alpha", "beta", "bias", "size")),
}
