"""What the benchmarks share: the network, the images, processes of their own, and Markdown."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from qdeploy.backend import Arrays
from qdeploy.export import export, load
from qdeploy.model import FloatModel, ModelSource
from qdeploy.parity.compare import Comparison
from qdeploy.prepare import prepare
from qdeploy.report.environment import environment
from qdeploy.samples.open import open_samples
from qdeploy.samples.preprocessing import Preprocessing
from qdeploy.samples.source import Sample, SampleSource

SOURCE = ModelSource.parse(f"{Path(__file__).parents[1]}/deploy_examples/02_efficientnet_lite0/model.py:build")
PREPROCESSING = Preprocessing.parse("crop=224 scale=1 mean=127 std=128")

Result = TypeVar("Result")


def image_folder(part: str) -> Path:
    """The folder of images, `calibration` or `evaluation`; without the data the benchmark ends here, and says so."""
    if "QDEPLOY_DATA" not in os.environ:
        sys.exit("SKIPPED: nothing was measured. Set QDEPLOY_DATA to the folder that holds imagenet/.")
    return Path(os.environ["QDEPLOY_DATA"]) / "imagenet" / part


def images(part: str, limit: int | None = None) -> SampleSource:
    """The labelled images of one part, decoded anew on each pass."""
    return open_samples(image_folder(part), input_names=("inputs",), preprocessing=PREPROCESSING, limit=limit)


def different_images(count: int) -> list[Sample]:
    """That many different images in memory: those for calibration, then those for evaluation."""
    found = list(islice(chain(images("calibration"), images("evaluation")), count))
    if len(found) < count:
        sys.exit(f"SKIPPED: nothing was measured. {count} images are needed and there are {len(found)}.")
    return found


def prepared_model(folder: Path) -> FloatModel:
    """EfficientNet-Lite0, exported and prepared into an existing folder."""
    exported, prepared = folder / "exported", folder / "prepared"
    exported.mkdir()
    prepared.mkdir()
    return prepare(export(load(SOURCE), images("evaluation"), exported), prepared)


@dataclass(frozen=True)
class SavedInputs:
    """The inputs of the first `count` samples of a folder, one .npy file each: streamed, and quick to read."""

    folder: Path
    name: str
    count: int

    def __iter__(self) -> Iterator[Arrays]:
        for index in range(self.count):
            yield {self.name: np.load(self.folder / f"{index}.npy")}


def save_inputs(samples: Sequence[Sample], folder: Path) -> SavedInputs:
    """Write the only input of each sample into an existing folder."""
    for index, sample in enumerate(samples):
        (array,) = sample.inputs.values()
        np.save(folder / f"{index}.npy", array)
    (name,) = samples[0].inputs
    return SavedInputs(folder, name, len(samples))


class OrtReader:
    """Samples in the form that ONNX Runtime's quantize_static takes them."""

    def __init__(self, inputs: SavedInputs) -> None:
        self._rest = iter(inputs)

    def get_next(self) -> Arrays | None:
        return next(self._rest, None)


def in_new_process(task: Callable[..., Result], *arguments: Any) -> Result:
    """What a function of a module gives in a fresh interpreter, so that memory and caches are its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(task, *arguments).result()


def peak_memory_mb() -> float:
    """Most resident memory of this process so far (Linux).

    Not getrusage's ru_maxrss: a new process inherits its parent's there.
    """
    status = Path("/proc/self/status").read_text("utf-8")
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024 / 1e6


def print_environment() -> None:
    """The machine and the versions that the figures belong to."""
    print_table(("Measured on", ""), environment().items())


def print_table(titles: Sequence[str], rows: Any) -> None:
    """A Markdown table of texts, and an empty line."""
    print("|", " | ".join(titles), "|")
    print("|", " | ".join("---" for _ in titles), "|")
    for row in rows:
        print("|", " | ".join(row), "|")
    print(flush=True)


def accuracy_cells(comparison: Comparison) -> tuple[str, ...]:
    """Metric, drop in points, its interval, agreement and SQNR."""
    assert comparison.drop is not None
    assert comparison.drop_interval is not None
    low, high = comparison.drop_interval
    return (
        percent(comparison.metric),
        f"{100 * comparison.drop:z.1f}",
        f"{100 * low:z.1f} to {100 * high:z.1f}",
        percent(comparison.agreement),
        f"{comparison.sqnr_db:.1f} dB",
    )


def percent(share: float | None) -> str:
    """A share, or a dash for one that was not measured."""
    return "-" if share is None else f"{100 * share:.1f} %"
