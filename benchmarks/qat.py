"""What training wins back where quantization afterwards fails: ResNet-20 with weights of few bits, one scale a tensor.

python benchmarks/qat.py [--bits 4] [--epochs 30] [--seeds 3]

The 500 CIFAR-10 images of cifar10/calibration are all that is trained on, the 2000 of cifar10/evaluation all that is
measured on. The teacher is the float network itself: its logits on the training images, shifted and mirrored.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch  # noqa: TID253 - this script does nothing without torch
from common import accuracy_cells, image_folder, percent, print_environment, print_table
from coreml import CIFAR, resnet20
from torch import Tensor, nn  # noqa: TID253 - likewise
from torch.nn import functional  # noqa: TID253 - likewise

import qdeploy
from qdeploy import qat
from qdeploy.backend import Runner
from qdeploy.calibration_readers.mse import Mse
from qdeploy.collect import collect
from qdeploy.export import LoadedModel, export, load
from qdeploy.graph import save_graph
from qdeploy.model import FloatModel, ModelSource
from qdeploy.parity.compare import compare
from qdeploy.parity.harness import FLOAT
from qdeploy.parity.metrics import metric_from_name
from qdeploy.plan import QuantPlan, plan, plan_from
from qdeploy.prepare import prepare
from qdeploy.recover.layer_data import simulate
from qdeploy.recover.recovery import Means
from qdeploy.recover.steps import recover
from qdeploy.samples.open import open_samples
from qdeploy.samples.source import SampleSource
from qdeploy.scheme import QuantContract, Scheme
from qdeploy.session import SessionRunner

BATCH = 50
LEARNING_RATE = 1e-3
TEMPERATURE = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description="What training wins back.")
    parser.add_argument("--bits", type=int, default=4, help="of the weights")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training images")
    parser.add_argument("--seeds", type=int, default=3, help="trainings, each from its own seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, contract = resnet20(), narrow_weights(arguments.bits)
    training, evaluation = cifar("calibration"), cifar("evaluation")
    images = torch.from_numpy(np.concatenate([sample.inputs["image"] for sample in training]))
    print_environment()
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as name, ExitStack() as stack:
        folder = Path(name)
        loaded, exported = to_onnx(model, folder / "float")
        runners: dict[str, Runner] = {FLOAT: stack.enter_context(SessionRunner(exported.path, graph_level="disable"))}

        def add(title: str, made: QuantPlan) -> None:
            path = folder / f"{len(runners)}.onnx"
            save_graph(simulate(made), path)
            runners[title] = stack.enter_context(SessionRunner(path, graph_level="disable"))

        statistics = collect(exported, training)
        drafted = plan(exported, statistics, contract, Mse())
        (folder / "steps").mkdir()
        means = Means(training, Mse(), (), folder / "steps")
        for steps in ((), ("bias-correction",), ("clipping", "adaround")):
            add("afterwards: " + (" + ".join(steps) or "plain"), recover(drafted, statistics, steps, means))
        for seed in range(arguments.seeds):
            began = time.perf_counter()
            finished = train(model, images, contract, arguments.epochs, seed)
            spent = time.perf_counter() - began
            loaded, exported = to_onnx(finished, folder / f"trained{seed}")
            assert loaded.learned is not None
            learned = replace(loaded.learned, labels=exported.labels)
            add(f"trained from seed {seed}, {spent:.0f} s", plan_from(exported, learned, contract))
        report(runners, evaluation)


def report(runners: dict[str, Runner], evaluation: SampleSource) -> None:
    pairs = [(FLOAT, each) for each in runners if each != FLOAT]
    compared = compare(runners, pairs, evaluation, metric_from_name("top1"))
    first = next(iter(compared.values()))
    print(f"FP32: {percent(first.reference_metric)} on {first.samples} images.\n")
    titles = ("Quantized", "top-1", "Drop, points", "95 % interval", "Agreement", "SQNR")
    print_table(titles, ((each, *accuracy_cells(comparison)) for (_, each), comparison in compared.items()))


def cifar(part: str) -> SampleSource:
    folder = image_folder(part).parents[1] / "cifar10" / part
    return open_samples(folder, input_names=("image",), preprocessing=CIFAR)


def narrow_weights(bits: int) -> QuantContract:
    """The rules of ort-cpu with weights of few bits and one scale a tensor."""

    def narrowed(scheme: Scheme | None) -> Scheme | None:
        weight = scheme is not None and scheme.integer.narrow
        return replace(scheme, integer=replace(scheme.integer, bits=bits)) if scheme and weight else scheme

    contract = qdeploy.contract("ort-cpu", precision="int8").with_per_tensor_weights()
    rules = (replace(r, inputs={i: narrowed(s) for i, s in r.inputs.items()}) for r in contract.rules)
    return replace(contract, precision=f"W{bits}A8", rules=tuple(rules))


def to_onnx(model: nn.Module, folder: Path) -> tuple[LoadedModel, FloatModel]:
    """The module as it was loaded, and exported and prepared."""
    folder.mkdir()
    for part in ("exported", "prepared"):
        (folder / part).mkdir()
    source = ModelSource("ResNet-20", "module", module=model, example_inputs=(torch.zeros(1, 3, 32, 32),))
    loaded = load(source)
    return loaded, prepare(export(loaded, (), folder / "exported"), folder / "prepared")


def train(model: nn.Module, images: Tensor, contract: QuantContract, epochs: int, seed: int) -> nn.Module:
    """The module after training against its own float logits, ready for export."""
    torch.manual_seed(seed)
    module = qat.prepare(model, contract, (images[:1],)).train()
    optimizer = torch.optim.Adam(module.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        if epoch == epochs // 2:
            qat.freeze_batchnorm(module)
        if epoch == epochs * 3 // 4:
            qat.freeze_observers(module)
        for batch in torch.randperm(len(images)).split(BATCH):
            x = augmented(images[batch])
            with torch.no_grad():
                target = functional.softmax(model(x) / TEMPERATURE, dim=1)
            loss = functional.cross_entropy(module(x) / TEMPERATURE, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return qat.finish(module)


def augmented(images: Tensor) -> Tensor:
    """The images, each moved by up to four pixels in each direction, every other one mirrored."""
    padded = functional.pad(images, (4, 4, 4, 4))
    rows, columns = torch.randint(0, 9, (2, len(images))).tolist()
    moved = torch.stack([p[:, r : r + 32, c : c + 32] for p, r, c in zip(padded, rows, columns, strict=True)])
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, moved.flip(3), moved)


if __name__ == "__main__":
    main()
