"""Networks that TensorRT engines are built of: for the benchmark and for the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qdeploy.export import export, load
from qdeploy.model import DimRange, FloatModel, ModelSource, TensorSpec
from qdeploy.prepare import prepare
from qdeploy.samples.source import Sample, SampleSource

if TYPE_CHECKING:
    from zoo import Architecture

EXAMPLES = Path(__file__).parents[1] / "deploy_examples"


@dataclass(frozen=True)
class Network:
    """A network to build engines of.

    Attributes:
        name: What it is called.
        source: Gives the module, with names, types and ranges of its inputs.
        sample: Inputs of random values.
    """

    name: str
    source: ModelSource
    sample: Mapping[str, Any]

    def prepared(self, folder: Path) -> FloatModel:
        """The float model, exported and prepared into an existing folder."""
        for part in ("exported", "prepared"):
            (folder / part).mkdir()
        samples = SampleSource(self.name, lambda: iter((Sample(self.sample),)), size=1)
        return prepare(export(load(self.source), samples, folder / "exported"), folder / "prepared")


def resnet_20() -> Any:
    """He et al. 2016 (arXiv 1512.03385), section 4.2: 19 3×3 convolutions and a classifier, 0.27 million weights."""
    return _resnet(_basic, (16, 32, 64), (3, 3, 3), stem=3, classes=10)


def resnet_50() -> Any:
    """The same, table 1: 53 convolutions and a classifier, 25.6 million weights."""
    return _resnet(_bottleneck, (64, 128, 256, 512), (3, 4, 6, 3), stem=7, classes=1000)


def _resnet(
    block: Callable[..., Any], widths: tuple[int, ...], depths: tuple[int, ...], stem: int, classes: int
) -> Any:
    from torch import nn

    channels, layers = widths[0], [*_unit(3, widths[0], stem, 2 if stem == 7 else 1), nn.ReLU()]
    if stem == 7:
        layers.append(nn.MaxPool2d(3, 2, 1))
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for index in range(depth):
            layers.append(block(channels, width, 2 if stage and not index else 1))
            channels = layers[-1].channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def _unit(inputs: int, outputs: int, size: int, stride: int = 1) -> list[Any]:
    from torch import nn

    return [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)]


def _basic(inputs: int, width: int, stride: int) -> Any:
    from torch import nn

    main = [*_unit(inputs, width, 3, stride), nn.ReLU(), *_unit(width, width, 3)]
    return _residual(main, inputs, width, stride)


def _bottleneck(inputs: int, width: int, stride: int) -> Any:
    from torch import nn

    first, second = _unit(inputs, width, 1), _unit(width, width, 3, stride)
    main = [*first, nn.ReLU(), *second, nn.ReLU(), *_unit(width, 4 * width, 1)]
    return _residual(main, inputs, 4 * width, stride)


def _residual(main: list[Any], inputs: int, outputs: int, stride: int) -> Any:
    from torch import Tensor, nn

    class Block(nn.Module):
        channels = outputs

        def __init__(self) -> None:
            super().__init__()
            self.main = nn.Sequential(*main)
            same = inputs == outputs and stride == 1
            self.skip = nn.Identity() if same else nn.Sequential(*_unit(inputs, outputs, 1, stride))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.relu(self.main(x) + self.skip(x))

    return Block()


def two_inputs() -> Any:
    """An image and a table row → four scores."""
    from torch import Tensor, cat, nn

    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image = nn.Sequential(*_unit(3, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.table, self.head = nn.Linear(8, 16), nn.Linear(32, 4)

        def forward(self, image: Tensor, table: Tensor) -> Tensor:
            return self.head(cat([self.image(image), nn.functional.relu(self.table(table))], dim=1))

    return TwoInputs()


def networks(zoo: Iterable[Architecture]) -> dict[str, Network]:
    """Every network that an engine is built of, by name; batches of 1 to 16, texts of 1 to 64 tokens.

    Args:
        zoo: The small networks of `zoo.py`, which scripts and tests import under different names.
    """
    small = {each.name: each for each in zoo}
    tokens = ("input_ids=int64[batch,tokens]", "attention_mask=int64[batch,tokens]")
    return {
        network.name: network
        for network in (
            _of_module("ResNet-20", resnet_20, "image=float32[batch,3,32,32]"),
            _of_module("ResNet-50", resnet_50, "image=float32[batch,3,224,224]"),
            _of_file("EfficientNet-Lite0", "02_efficientnet_lite0", "inputs=float32[batch,3,224,224]"),
            _of_file("MiniLM", "03_minilm", *tokens),
            _of_module("LSTM tagger", small["LSTM tagger"].module, *small["LSTM tagger"].inputs),
            _of_module("U-Net", small["U-Net"].module, *small["U-Net"].inputs),
            _of_module("two inputs", two_inputs, "image=float32[batch,3,32,32]", "table=float32[batch,8]"),
        )
    }


def _of_module(name: str, make: Callable[[], Any], *inputs: str) -> Network:
    import torch

    torch.manual_seed(0)
    module, specs = make().eval(), tuple(map(TensorSpec.parse, inputs))
    sample = {spec.name: _values(spec) for spec in specs}
    examples = tuple(torch.from_numpy(array) for array in sample.values())
    return Network(name, ModelSource(name, "module", specs, _ranges(specs), module, examples), sample)


def _of_file(name: str, example: str, *inputs: str) -> Network:
    specs = tuple(map(TensorSpec.parse, inputs))
    source = ModelSource.parse(f"{EXAMPLES / example / 'model.py'}:build", specs, _ranges(specs))
    return Network(name, source, {spec.name: _values(spec) for spec in specs})


def _ranges(specs: tuple[TensorSpec, ...]) -> dict[str, DimRange]:
    names = {dim for spec in specs for dim in spec.shape if isinstance(dim, str)}
    return {name: DimRange(1, 8, 16) if name == "batch" else DimRange(1, 16, 64) for name in names}


def _values(spec: TensorSpec) -> Any:
    shape = [dim if isinstance(dim, int) else (2 if dim == "batch" else 12) for dim in spec.shape]
    if spec.dtype == "float32":
        return np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return np.ones(shape, spec.dtype)
