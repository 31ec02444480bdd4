"""What every peer's script does: read samples, quantize, and say what it took. Imports nothing but numpy.

python benchmarks/peers/NAME.py METHOD MODEL SAMPLES OUTPUT
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Samples:
    """A folder of .npz files, one for each sample; read anew on every pass, in the order of their names."""

    folder: Path

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for path in sorted(self.folder.glob("*.npz")):
            with np.load(path) as arrays:
                yield dict(arrays)

    def __len__(self) -> int:
        return len(list(self.folder.glob("*.npz")))


class Reader:
    """Samples in the form that ONNX Runtime's tools, and those made after them, take."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self.rewind()

    def rewind(self) -> None:
        self._rest = iter(self._samples)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._rest, None)

    def __len__(self) -> int:
        return len(self._samples)


Method = Callable[[Path, Samples, Path], object]
"""Quantizes a model with samples into a file."""


def run(methods: Mapping[str, Method]) -> None:
    """Do what the command line says; the last line on standard output is the cost, as JSON."""
    method, model, folder, output = sys.argv[1:]
    start = time.perf_counter()
    methods[method](Path(model), Samples(Path(folder)), Path(output))
    seconds = time.perf_counter() - start
    print("\n" + json.dumps({"seconds": seconds, "peak_mb": _peak_memory_mb()}))


def _peak_memory_mb() -> float:
    """Most resident memory of this process so far (Linux)."""
    status = Path("/proc/self/status").read_text("utf-8")
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024 / 1e6
