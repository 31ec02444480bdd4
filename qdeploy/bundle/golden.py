"""Golden samples: a few evaluation samples with what each runner gave for them, so that others can compare.

    golden/inputs.npz     arrays named by the model's inputs
    golden/outputs.npz    arrays `float/<output>` and `<folder>/<output>`
    golden/raw.npz        arrays `<input>/<index>`: the raw sample before preprocessing, where there is any

Samples whose arrays all have a batch of one are joined along it: sample i is a[i:i+1]. Others are stacked on a new
first axis: sample i is a[i]. So inputs.npz can be given wherever samples are asked for. The raw sample of an image
file is the file's bytes as uint8, so that a device can prove its own decoder too.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.archive import require_modest
from qdeploy.backend import Arrays
from qdeploy.bundle.load import Bundle
from qdeploy.errors import InputError
from qdeploy.samples.arrays import DAMAGE

SAMPLES = 64
BYTES = 16_000_000


@dataclass(frozen=True)
class GoldenSample:
    """One sample, and what came of it.

    Attributes:
        inputs: Whole model inputs, batch included.
        outputs: By the folder of the model in the bundle, "float" among them.
        raw: What the inputs were made from, by input name; empty without preprocessing.
    """

    inputs: Arrays
    outputs: Mapping[str, Arrays]
    raw: Arrays = field(default_factory=dict)


def write_golden(bundle: Path, samples: Iterable[GoldenSample]) -> int:
    """Write the golden samples of a bundle: those among the first 64, within 16 MB, that are shaped like the first.

    Args:
        bundle: The bundle's folder, not yet sealed.
        samples: Taken one by one and no further than needed, so that outputs can be computed on the way.

    Returns:
        How many were kept; without any, nothing is written.
    """
    kept = _kept(samples)
    if not kept:
        return 0
    inputs = [sample.inputs for sample in kept]
    outputs = [_flat(sample.outputs) for sample in kept]
    raw = {f"{name}/{i}": array for i, sample in enumerate(kept) for name, array in sample.raw.items()}
    batch_of_one = all(array.shape[:1] == (1,) for array in _joined_arrays(kept[0]).values())
    join = np.concatenate if batch_of_one else np.stack
    folder = bundle / "golden"
    folder.mkdir()
    write_npz(folder / "inputs.npz", {name: join([arrays[name] for arrays in inputs]) for name in inputs[0]})
    write_npz(folder / "outputs.npz", {name: join([arrays[name] for arrays in outputs]) for name in outputs[0]})
    if raw:
        write_npz(folder / "raw.npz", raw)
    return len(kept)


def _flat(outputs: Mapping[str, Arrays]) -> dict[str, NDArray[Any]]:
    return {f"{folder}/{name}": array for folder, arrays in outputs.items() for name, array in arrays.items()}


def _kept(samples: Iterable[GoldenSample]) -> list[GoldenSample]:
    kept: list[GoldenSample] = []
    room = BYTES
    for sample in islice(samples, SAMPLES):
        if kept and _form(sample) != _form(kept[0]):
            continue
        room -= sum(array.nbytes for array in (*_joined_arrays(sample).values(), *sample.raw.values()))
        if room < 0:
            break
        kept.append(sample)
    return kept


def _joined_arrays(sample: GoldenSample) -> dict[str, NDArray[Any]]:
    return _flat({"": sample.inputs, **sample.outputs})


def _form(sample: GoldenSample) -> dict[str, tuple[Any, ...]]:
    """What must be alike in samples that are joined."""
    return {name: (array.shape, array.dtype) for name, array in _joined_arrays(sample).items()}


def write_npz(path: Path, arrays: Arrays) -> None:
    """An .npz as numpy.savez writes it, but without dates, and with any name for an array."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def read_golden(bundle: Bundle) -> tuple[GoldenSample, ...]:
    """The golden samples of a bundle, in order; none if it holds none."""
    folder = bundle.path / "golden"
    if not folder.exists():
        return ()
    inputs, outputs = read_npz(folder / "inputs.npz"), read_npz(folder / "outputs.npz")
    raw = read_npz(folder / "raw.npz") if (folder / "raw.npz").exists() else {}
    first = bundle.manifest.inputs[0]
    batch_of_one = inputs[first.name].ndim == len(first.shape)
    samples = []
    for i in range(len(inputs[first.name])):
        index = slice(i, i + 1) if batch_of_one else i
        by_folder: dict[str, dict[str, NDArray[Any]]] = {}
        for path, array in outputs.items():
            of, _, name = path.partition("/")
            by_folder.setdefault(of, {})[name] = np.asarray(array[index])
        own = {name: np.asarray(array[index]) for name, array in inputs.items()}
        samples.append(GoldenSample(own, by_folder, {n: raw[f"{n}/{i}"] for n in own if f"{n}/{i}" in raw}))
    return tuple(samples)


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz by name.

    Raises:
        InputError: It is damaged, holds more than numbers, or would fill the memory.
    """
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            require_modest(file.zip, path.stat().st_size)
            return {name: file[name] for name in file.files}
    except DAMAGE as error:
        raise InputError(f"{path} cannot be read: {error}.", "Export the bundle anew.") from error
