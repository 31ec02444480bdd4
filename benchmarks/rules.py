"""What the rules of ort-cpu's int8 contract for transformers rest on: each operator in float and as integers.

One small graph a rule, in the sizes of a MiniLM layer (128 tokens, 384 features, 12 heads, a vocabulary of 30,522), on
one thread. Every graph reads and writes float, as an operator between float operators does.

python benchmarks/rules.py [--repeats 20]
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from common import print_environment, print_table
from numpy.typing import NDArray

from qdeploy.backend import Arrays
from qdeploy.parity.latency import measure, speedup
from qdeploy.session import SessionRunner

TOKENS, FEATURES, INNER, HEADS, VOCABULARY = 128, 384, 1536, 12, 30522
BUDGET_S = 20.0
FLOAT = "float"

U8 = {"s": np.float32(0.03), "z": np.uint8(128)}
"""An unsigned grid for activations: QuantizeLinear(x, s, z)."""
I8 = {"t": np.float32(0.03), "i": np.int8(0)}
"""A signed one."""


@dataclass(frozen=True)
class Rule:
    """One rule's graphs.

    Attributes:
        name: The operator, and where it stands.
        inputs: One sample.
        constants: The initializers that the graphs share.
        bodies: What computes y, in ONNX's text form, by the name of the variant; the first is float.
    """

    name: str
    inputs: Arrays
    constants: Mapping[str, NDArray[np.generic] | np.generic]
    bodies: Mapping[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description="What the int8 rules for transformers rest on.")
    parser.add_argument("--repeats", type=int, default=20, help="rounds of five counted runs of each graph")
    arguments = parser.parse_args()
    print_environment()
    rows = [row for rule in rules() for row in _rows(rule, arguments.repeats)]
    print_table(("Rule", "Computed as", "p50", "Speed against float", "95 % interval"), rows)


def rules() -> Iterator[Rule]:
    """The graphs, rule by rule."""
    rng = np.random.default_rng(0)
    tokens = {"x": rng.standard_normal((1, TOKENS, FEATURES)).astype(np.float32)}
    wide = {"x": rng.standard_normal((1, TOKENS, INNER)).astype(np.float32)}
    scores = {"x": rng.standard_normal((1, HEADS, TOKENS, TOKENS)).astype(np.float32)}
    yield Rule("MatMul with a constant weight", tokens, {**U8, **I8, **_weight(rng, FEATURES, INNER)}, _PRODUCT)
    heads = rng.standard_normal((2, 1, HEADS, TOKENS, FEATURES // HEADS)).astype(np.float32)
    yield Rule("MatMul of two activations", {"x": heads[0], "k": heads[1].swapaxes(-1, -2).copy()}, U8, _ATTENTION)
    yield Rule("Softmax", scores, {**U8, "p": np.float32(1 / 255), "o": np.uint8(0)}, _SOFTMAX)
    norm = {"g": np.ones(FEATURES, np.float32), "b": np.zeros(FEATURES, np.float32)}
    yield Rule("LayerNormalization", tokens, {**U8, **norm}, _around("LayerNormalization<axis = -1>", ", g, b"))
    yield Rule("Gelu", wide, U8, _around("Gelu", ""))
    yield Rule("Add of a residual", tokens | {"r": tokens["x"][::-1].copy()}, U8, _RESIDUAL)
    table = rng.integers(-127, 128, (VOCABULARY, FEATURES), np.int8)
    constants = {**I8, "table": (0.03 * table).astype(np.float32), "stored": table, **_small_tables(rng)}
    yield Rule("Gather of embeddings", {"ids": rng.integers(0, VOCABULARY, (1, TOKENS))}, constants, _GATHER)


def _small_tables(rng: np.random.Generator) -> dict[str, NDArray[np.generic]]:
    """A scale for each row of 8 bits; 4 bits in blocks of 32, with scales and zero points."""
    import ml_dtypes

    counts = (VOCABULARY, FEATURES // 32)
    nibbles = {"blocks": (VOCABULARY, FEATURES), "zeros": counts}
    return {
        "rows": rng.uniform(0.02, 0.04, (VOCABULARY, 1)).astype(np.float32),
        "scales": rng.uniform(0.2, 0.4, counts).astype(np.float32),
        **{name: rng.integers(0, 16, shape, np.uint8).astype(ml_dtypes.uint4) for name, shape in nibbles.items()},
    }


def _weight(rng: np.random.Generator, rows: int, columns: int) -> dict[str, NDArray[np.generic]]:
    stored = rng.integers(-127, 128, (rows, columns), np.int8)
    scales = rng.uniform(0.0005, 0.001, columns).astype(np.float32)
    return {"w": stored * scales, "wq": stored, "ws": scales, "wz": np.zeros(columns, np.int8)}


def _pair(name: str, grid: str = "s, z") -> str:
    """A QuantizeLinear and its DequantizeLinear: `name` → `name`_d."""
    return f"{name}_q = QuantizeLinear({name}, {grid}) {name}_d = DequantizeLinear({name}_q, {grid})"


_WEIGHT = "w_d = DequantizeLinear<axis = 1>(wq, ws, wz)"
_PRODUCT = {
    FLOAT: "y = MatMul(x, w)",
    "unsigned input, float output": f"{_pair('x')} {_WEIGHT} y = MatMul(x_d, w_d)",
    "unsigned input and output": f"{_pair('x')} {_WEIGHT} m = MatMul(x_d, w_d) {_pair('m')} y = Identity(m_d)",
    "signed input, float output": f"{_pair('x', 't, i')} {_WEIGHT} y = MatMul(x_d, w_d)",
    "signed input and output": (
        f"{_pair('x', 't, i')} {_WEIGHT} m = MatMul(x_d, w_d) {_pair('m', 't, i')} y = Identity(m_d)"
    ),
}
_ATTENTION = {
    FLOAT: "y = MatMul(x, k)",
    "unsigned inputs, float output": f"{_pair('x')} {_pair('k')} y = MatMul(x_d, k_d)",
    "unsigned inputs and output": f"{_pair('x')} {_pair('k')} m = MatMul(x_d, k_d) {_pair('m')} y = Identity(m_d)",
}
_SOFTMAX = {
    FLOAT: "y = Softmax<axis = -1>(x)",
    "unsigned input and output": f"{_pair('x')} m = Softmax<axis = -1>(x_d) {_pair('m', 'p, o')} y = Identity(m_d)",
}
_RESIDUAL = {
    FLOAT: "y = Add(x, r)",
    "unsigned inputs and output": f"{_pair('x')} {_pair('r')} m = Add(x_d, r_d) {_pair('m')} y = Identity(m_d)",
}
_GATHER = {
    FLOAT: "y = Gather(table, ids)",
    "int8 table, dequantized behind": "m = Gather(stored, ids) y = DequantizeLinear(m, t, i)",
    "int8 rows, a scale each": ("m = Gather(stored, ids) f = Cast<to = 1>(m) k = Gather(rows, ids) y = Mul(f, k)"),
    "uint4 in blocks of 32": (
        "y = com.microsoft.GatherBlockQuantized<block_size = 32, gather_axis = 0, quantize_axis = 1>"
        "(blocks, ids, scales, zeros)"
    ),
    "int8 table, dequantized before": "m = DequantizeLinear(stored, t, i) y = Gather(m, ids)",
    "int8 table, QDQ pair behind": (
        f"d = DequantizeLinear(stored, t, i) m = Gather(d, ids) {_pair('m', 't, i')} y = Identity(m_d)"
    ),
}


def _around(operator: str, operands: str) -> dict[str, str]:
    """An operator of one computed input, in float and between pairs."""
    return {
        FLOAT: f"y = {operator}(x{operands})",
        "unsigned input and output": f"{_pair('x')} m = {operator}(x_d{operands}) {_pair('m')} y = Identity(m_d)",
    }


def _rows(rule: Rule, rounds: int) -> list[tuple[str, ...]]:
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as name, ExitStack() as stack:
        runs = {}
        for index, (variant, body) in enumerate(rule.bodies.items()):
            path = Path(name) / f"{index}.onnx"
            _write(rule, body, path)
            runner = stack.enter_context(SessionRunner(path, threads=1))
            runs[variant] = partial(runner.run, rule.inputs)
        times = measure(runs, rounds=rounds, budget_s=BUDGET_S)
    rows = []
    for variant in rule.bodies:
        ratio, (low, high) = speedup(times[FLOAT], times[variant])
        against = ("", "") if variant == FLOAT else (f"**{ratio:.2f}×**", f"{low:.2f} to {high:.2f}")
        rows.append((rule.name, variant, f"{times[variant].p50:.3f} ms", *against))
    return rows


def _write(rule: Rule, body: str, path: Path) -> None:
    """The graph of one variant, with those constants that it reads."""
    import re

    import onnx

    kinds = {"float32": "float", "int64": "int64"}
    inputs = ", ".join(f"{kinds[a.dtype.name]}{list(a.shape)} {name}" for name, a in rule.inputs.items())
    header = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>'
    model = onnx.parser.parse_model(f"{header} net ({inputs}) => (float y) {{ {body} }}")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    read = set(re.findall(r"\w+", body))
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in rule.constants.items() if name in read
    )
    onnx.save(model, path)


if __name__ == "__main__":
    main()
