"""A reference that many candidates are compared with runs once on each sample, and not once for each candidate."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qdeploy.backend import Arrays, Evidence, Runner
from qdeploy.samples.warnings import sample_digest


class Remembered(Runner):
    """Gives what a runner gave for the same inputs before.

    Args:
        runner: Not yet entered; it has no state, so that equal inputs give equal outputs.
        folder: An empty one, where outputs are kept: one file a sample.
    """

    evidence = Evidence.EXECUTED

    def __init__(self, runner: Runner, folder: Path) -> None:
        self._runner = runner
        self._folder = folder
        self._names: list[str] = []

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name."""
        path = self._folder / f"{sample_digest(inputs)}.npz"
        if not path.exists():
            outputs = self._runner.run(inputs)
            self._names = list(outputs)
            np.savez(path, *outputs.values())
            return outputs
        with np.load(path) as arrays:
            return {name: arrays[f"arr_{place}"] for place, name in enumerate(self._names)}

    def __enter__(self) -> Self:
        self._runner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.__exit__(kind, error, trace)
