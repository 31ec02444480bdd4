"""MatMul and Gemm: `linear` where the right operand is a constant matrix, `matmul` otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np

from qdeploy.backends.coreml.call import Call, Handler


def multiply(call: Call) -> Any:
    """A product of matrices, batches of them, or vectors."""
    mb, left, right = call.mb, call.rank(0), call.rank(1)
    if right == 2 and left >= 2 and call.constant(1) is not None and call.constant(0) is None:
        return mb.linear(x=call.var(0), weight=call.weight(1, transposed=True))
    x = mb.expand_dims(x=call.var(0), axes=np.array([0], np.int32)) if left == 1 else call.var(0)
    y = mb.expand_dims(x=call.var(1), axes=np.array([1], np.int32)) if right == 1 else call.var(1)
    product = mb.matmul(x=x, y=y)
    gone = [axis for axis, rank in ((-2, left), (-1, right)) if rank == 1]
    return mb.squeeze(x=product, axes=np.array(gone, np.int32)) if gone else product


def gemm(call: Call) -> Any:
    """Alpha · A · B + beta · C, each of A and B transposed on demand."""
    mb, alpha, beta = call.mb, call.number("alpha", 1.0), call.number("beta", 1.0)
    transposed_a, transposed_b = bool(call.integer("transA", 0)), bool(call.integer("transB", 0))
    x = call.var(0) if alpha == 1 else mb.mul(x=call.var(0), y=np.float32(alpha))
    if call.constant(1) is None or call.constant(0) is not None:
        product = mb.matmul(x=x, y=call.var(1), transpose_x=transposed_a, transpose_y=transposed_b)
        return _plus(call, product, beta)
    if transposed_a:
        x = mb.transpose(x=x, perm=np.array([1, 0], np.int32))
    weight = call.weight(1, transposed=not transposed_b)
    added = call.constant(2)
    outputs = weight.shape[0]
    if added is None or added.size not in (1, outputs) or added.shape[:-1] not in ((), (1,)):
        return _plus(call, mb.linear(x=x, weight=weight), beta)
    bias = np.broadcast_to(np.float32(beta) * added.ravel(), (outputs,)).copy()
    return mb.linear(x=x, weight=weight, bias=bias)


def _plus(call: Call, product: Any, beta: float) -> Any:
    if not call.has(2):
        return product
    added = call.var(2) if beta == 1 else call.mb.mul(x=call.var(2), y=np.float32(beta))
    return call.mb.add(x=product, y=added)


HANDLERS = {
    "MatMul": Handler(multiply),
    "Gemm": Handler(gemm, ("alpha", "beta", "transA", "transB")),
}
