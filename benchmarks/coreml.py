"""Core ML packages of five networks: size, conversion time, and how close the saved package stays.

python benchmarks/coreml.py [--images 300] [--only NAME]
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: TID253 - ResNet-20 is a module
from common import SOURCE, image_folder, images, print_environment, print_table
from layer_by_layer import each_alone
from numpy.typing import NDArray
from zoo import ZOO

from qdeploy.backend import Artifact, Runner
from qdeploy.backends.coreml.backend import CoreML, Options
from qdeploy.backends.coreml.tools import coremltools
from qdeploy.collect import collect
from qdeploy.export import export, load
from qdeploy.model import DimRange, FloatModel, ModelSource, QuantizedModel, TensorSpec, size_of_files
from qdeploy.pipeline import calibration_reader
from qdeploy.plan import plan
from qdeploy.prepare import prepare
from qdeploy.quantize.static import quantize
from qdeploy.recover.steps import recover
from qdeploy.samples.open import open_samples
from qdeploy.samples.preprocessing import Preprocessing
from qdeploy.samples.source import Sample, SampleSource
from qdeploy.session import SessionRunner

Outputs = Mapping[str, NDArray[Any]]

CIFAR = Preprocessing.parse("mean=0.4914,0.4822,0.4465 std=0.2470,0.2435,0.2616")
TITLES = ("Network", "FP32 package", "INT8 package", "Smaller", "Converting FP32", "INT8", "FP32 from ONNX")
CLOSENESS = (
    *("Network", "Samples", "Largest, LSB", "Median of samples", "Samples within 1 LSB"),
    *("ORT optimized: largest", "Median"),
)
ACCURACY = (
    *("Network", "Samples", "FP32 top-1", "INT8 package", "Drop, points", "Same as QDQ", "Where FP32 is 2 LSB clear"),
)
ALONE = (
    "Network",
    "Samples",
    "Layers",
    "Integers they write",
    "Of them not ORT's",
    "By at most",
    "Output by at most, LSB",
)
ALONE_SAMPLES = 20


@dataclass(frozen=True)
class Network:
    """A network, and the samples to calibrate and to compare it on."""

    name: str
    source: ModelSource
    calibration: Callable[[], SampleSource]
    evaluation: Callable[[], SampleSource]


class Block(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(outputs)
        self.conv2 = torch.nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(outputs)
        self.added = outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.added:
            half = self.added // 2
            x = torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
        return torch.relu(x + y)


class ResNet20(torch.nn.Module):
    """He et al. 2015 (arXiv 1512.03385, section 4.2), with shortcuts that pad."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(16)
        for stage, (inputs, outputs) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            first = Block(inputs, outputs, 1 if stage == 1 else 2)
            setattr(self, f"layer{stage}", torch.nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(2))))
        self.linear = torch.nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(image)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet20() -> ResNet20:
    """With the CIFAR-10 weights from QDEPLOY_DATA."""
    path = Path(os.environ["QDEPLOY_DATA"]) / "weights/resnet20-cifar10.pth"
    stored = torch.load(path, weights_only=True, map_location="cpu")
    stored = stored.get("state_dict", stored)
    model = ResNet20()
    model.load_state_dict({key.removeprefix("module."): value for key, value in stored.items()})
    return model.eval()


def networks(limit: int | None) -> Iterator[Network]:
    """EfficientNet-Lite0, ResNet-20 and MiniLM with their weights; a U-Net and an LSTM tagger with random ones."""
    yield Network("EfficientNet-Lite0", SOURCE, lambda: images("calibration"), lambda: images("evaluation", limit))
    example = (torch.zeros(1, 3, 32, 32),)
    source = ModelSource("ResNet-20", "module", module=resnet20(), example_inputs=example)
    yield Network("ResNet-20", source, lambda: _cifar("calibration", 200), lambda: _cifar("evaluation", limit))
    minilm = replace(
        ModelSource.parse(f"{Path(__file__).parents[1]}/deploy_examples/03_minilm/model.py:build"),
        inputs=tuple(TensorSpec.parse(f"{name}=int64[batch,tokens]") for name in ("input_ids", "attention_mask")),
        dims={"batch": DimRange(1, 1, 8), "tokens": DimRange(1, 16, 128)},
    )
    yield Network("MiniLM", minilm, lambda: _sentences("calibration", 64), lambda: _sentences("evaluation", 64))
    for each in ZOO:
        if each.name not in ("U-Net", "LSTM tagger"):
            continue
        dims = {name: DimRange(1, size, 2 * size) for name, size in each.sizes.items()}
        specs = tuple(map(TensorSpec.parse, each.inputs))
        source = ModelSource(each.name, "module", specs, dims, module=each.module())
        calibration, evaluation = ([Sample(each.sample(s)) for s in seeds] for seeds in (range(8), range(100, 132)))
        yield Network(each.name, source, lambda c=calibration: _given(c), lambda e=evaluation: _given(e))  # type: ignore[misc]


def _given(samples: list[Sample]) -> SampleSource:
    return SampleSource("random values", lambda: iter(samples), size=len(samples))


def _cifar(part: str, limit: int | None) -> SampleSource:
    folder = image_folder(part).parents[1] / "cifar10" / part
    found = open_samples(folder, input_names=("image",), preprocessing=CIFAR)
    step = max(1, (found.size or 1) // (limit or 300))
    return SampleSource(str(folder), lambda: islice(iter(found), 0, None, step), size=None)


def _sentences(part: str, limit: int) -> SampleSource:
    from text import _shapes, sentences

    return sentences(part, _shapes()["of their own lengths"], limit)


def main() -> None:
    parser = argparse.ArgumentParser(description="Core ML packages of five networks.")
    parser.add_argument("--images", type=int, default=300, help="most evaluation images")
    parser.add_argument("--only", help="one network")
    arguments = parser.parse_args()
    if "QDEPLOY_DATA" not in os.environ:
        sys.exit(
            "SKIPPED: nothing was measured. Set QDEPLOY_DATA to the folder that holds imagenet/, cifar10/ and stsb/."
        )
    torch.set_num_threads(1)
    coremltools()
    print_environment()
    tables: dict[tuple[str, ...], list[tuple[str, ...]]] = {TITLES: [], CLOSENESS: [], ALONE: [], ACCURACY: []}
    for network in networks(arguments.images):
        if arguments.only in (None, network.name):
            for titles, rows in measure(network).items():
                tables[titles] += rows
    for titles, rows in tables.items():
        print_table(titles, rows)


def measure(network: Network) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    """Its rows of each table; one of accuracy only if the samples have labels."""
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as name:
        folder = Path(name)
        for part in ("exported", "prepared", "quantized", "float", "int8"):
            (folder / part).mkdir()
        evaluation = network.evaluation()
        first = SampleSource("one sample", lambda: islice(iter(evaluation), 1), size=1)
        model = prepare(export(load(network.source), first, folder / "exported"), folder / "prepared")
        quantized = _quantized(model, network.calibration(), folder / "quantized")
        float_artifact, float_time = _lowered(model, "fp32", folder / "float")
        artifact, time_taken = _lowered(quantized, "int8", folder / "int8")
        closeness = Closeness()
        with (
            SessionRunner(model.path, graph_level="disable") as onnx,
            SessionRunner(quantized.path, graph_level="disable") as qdq,
            CoreML().open(float_artifact, Options()) as float_package,
            CoreML().open(artifact, Options()) as package,
            SessionRunner(quantized.path) as optimized,
        ):
            closeness.add_all(evaluation, (onnx, qdq, float_package, package, optimized))
        sizes = [_size(each) for each in (float_artifact, artifact)]
        row = (
            network.name,
            *(f"{size / 1e6:.2f} MB" for size in sizes),
            f"**{sizes[0] / sizes[1]:.2f}×**",
            f"{float_time:.1f} s",
            f"{time_taken:.1f} s",
            f"{closeness.float_error:.1e}",
        )
        alone = _alone_row(network.name, artifact, quantized, list(islice(evaluation, ALONE_SAMPLES)))
        return {
            TITLES: [row],
            CLOSENESS: [closeness.row(network.name)],
            ALONE: [alone],
            ACCURACY: closeness.accuracy(network.name),
        }


def _alone_row(name: str, artifact: Artifact, quantized: QuantizedModel, samples: list[Sample]) -> tuple[str, ...]:
    """How far each layer is from ONNX Runtime's, given the same integers."""
    found = each_alone(artifact.path, quantized.path, samples)
    outputs = [found.pop(spec.name) for spec in quantized.float_model.outputs]
    values, differing = (sum(getattr(each, part) for each in found.values()) for part in ("values", "differing"))
    return (
        name,
        str(len(samples)),
        str(len(found)),
        f"{values:,}",
        f"{differing:,} ({differing / values:.1e})",
        f"{max(each.steps for each in found.values()):.0f}",
        f"{max(each.steps for each in outputs):.4f}",
    )


def _quantized(model: FloatModel, calibration: Iterable[Sample], folder: Path) -> QuantizedModel:
    """As the pipeline does by default: mse, bias correction."""
    statistics = collect(model, calibration)
    drafted = plan(model, statistics, CoreML().contract("int8", Options()), calibration_reader("mse"))
    return quantize(recover(drafted, statistics, ("bias-correction",)), folder)


def _lowered(model: FloatModel | QuantizedModel, precision: str, folder: Path) -> tuple[Artifact, float]:
    begin = time.perf_counter()
    artifact = CoreML().lower(model, precision, folder, Options())
    return artifact, time.perf_counter() - begin


def _size(artifact: Artifact) -> int:
    return size_of_files(tuple(path for path in artifact.directory.rglob("*") if path.is_file()))


class Closeness:
    """How far packages are from ONNX Runtime without graph rewrites, sample by sample."""

    def __init__(self) -> None:
        self.float_error = 0.0
        self._errors: list[dict[str, tuple[float, float]]] = []
        self._ranges: dict[str, tuple[float, float]] = {}
        self._scores: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]] = []

    def add_all(self, samples: Iterable[Sample], runners: tuple[Runner, ...]) -> None:
        """Run every runner on every sample: ONNX, QDQ, the packages of both, QDQ with ORT's optimizations."""
        for sample in samples:
            onnx, qdq, float_package, package, optimized = (runner.run(sample.inputs) for runner in runners)
            for name, expected in onnx.items():
                error = np.abs(float_package[name] - expected).max() / np.abs(expected).max()
                self.float_error = max(self.float_error, float(error))
                low, high = self._ranges.get(name, (0.0, 0.0))
                self._ranges[name] = min(low, float(qdq[name].min())), max(high, float(qdq[name].max()))
            own = {
                name: (float(np.abs(package[name] - array).max()), float(np.abs(optimized[name] - array).max()))
                for name, array in qdq.items()
            }
            self._errors.append(own)
            if sample.labels is not None and np.issubdtype(np.asarray(sample.labels).dtype, np.integer):
                (name,) = onnx
                self._scores.append((onnx[name], qdq[name], package[name], np.asarray(sample.labels)))

    def row(self, name: str) -> tuple[str, ...]:
        """Distances from the QDQ graph, in 255ths of the output's range over all samples."""
        steps = np.array(
            [
                [max(errors[output][which] / self._lsb(output) for output in errors) for which in (0, 1)]
                for errors in self._errors
            ]
        )
        within = int((steps[:, 0] <= 1.0001).sum())
        largest, medians = steps.max(axis=0), np.median(steps, axis=0)
        return (
            name,
            str(len(steps)),
            f"**{largest[0]:.2f}**",
            f"{medians[0]:.2f}",
            f"{within} of {len(steps)}",
            f"{largest[1]:.2f}",
            f"{medians[1]:.2f}",
        )

    def _lsb(self, name: str) -> float:
        low, high = self._ranges[name]
        return (high - low) / 255

    def accuracy(self, name: str) -> list[tuple[str, ...]]:
        """Top-1 of FP32 and of the INT8 package, and how often the package decides as its QDQ graph does."""
        if not self._scores:
            return []
        onnx, qdq, package, labels = (np.concatenate(part) for part in zip(*self._scores, strict=True))
        ordered = np.sort(onnx, axis=-1)
        clear = ordered[:, -1] - ordered[:, -2] > 2 * self._lsb(next(iter(self._ranges)))
        top = [each.argmax(axis=-1) for each in (onnx, qdq, package)]
        reference, own = (100 * float(np.mean(top[i] == labels)) for i in (0, 2))
        same = top[1] == top[2]
        return [
            (
                name,
                str(len(labels)),
                f"{reference:.1f} %",
                f"{own:.1f} %",
                f"{reference - own:z.1f}",
                f"{same.sum()} of {same.size}",
                f"{same[clear].sum()} of {clear.sum()}",
            )
        ]


if __name__ == "__main__":
    main()
