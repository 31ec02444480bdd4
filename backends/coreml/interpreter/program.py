"""A program that has been loaded: what it takes and gives, its operations, and how to run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.backend import Arrays
from qdeploy.backends.coreml.interpreter.values import Feature, Operation
from qdeploy.errors import InputError, UnavailableError

if TYPE_CHECKING:
    from qdeploy.backends.coreml.interpreter.routine import Executable


@dataclass(frozen=True)
class Program:
    """An ML program.

    fp16 is emulated: an operation reads fp16 values, computes in float32, and rounds what it writes to fp16. Sums
    inside an operation are therefore more exact than on hardware that accumulates in fp16, such as the Neural Engine.

    Attributes:
        name: File name of the package.
        inputs: What it takes, by name.
        outputs: What it gives, by name, in the package's order.
        operations: Those of its main function, in order.
        unknown_operators: What the interpreter cannot run, each once: "lstm(peephole)" is that argument of an lstm,
            "const of fp64" that element type.
        executable: What `run` executes; None if anything is unknown.
    """

    name: str
    inputs: Mapping[str, Feature]
    outputs: Mapping[str, Feature]
    operations: tuple[Operation, ...]
    unknown_operators: tuple[str, ...]
    executable: Executable | None

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name for whole inputs by name.

        A classifier gives its label as an array without dimensions, and its probabilities in the order of its classes.

        Raises:
            UnavailableError: The program holds operators that the interpreter does not know.
            InputError: The inputs are not what the package states, or hold an index that is out of range.
        """
        if self.executable is None:
            what = f"The interpreter cannot run {self.name}: it does not know {', '.join(self.unknown_operators)}."
            raise UnavailableError(what, "Run the package on a Mac, or convert the model without them.")
        for name, feature in self.inputs.items():
            _check(self.name, feature, inputs.get(name))
        if extra := next((name for name in inputs if name not in self.inputs), None):
            raise InputError(f"{self.name} has no input {extra!r}.", self._takes())
        arrays = {name: np.asarray(inputs[name], feature.dtype) for name, feature in self.inputs.items()}
        results = self.executable.run(arrays)
        return {name: np.array(results[name], feature.dtype) for name, feature in self.outputs.items()}

    def _takes(self) -> str:
        return f"It takes {', '.join(map(str, self.inputs.values()))}."


def _check(package: str, feature: Feature, array: NDArray[Any] | None) -> None:
    """Refuse an array that is not what the package states; an image's values may have any dtype."""
    if array is None:
        raise InputError(f"{package} needs an input {feature.name!r}.", f"It takes {feature}.")
    given = np.asarray(array)
    if (given.dtype.name != feature.dtype and not feature.image) or not feature.accepts(given.shape):
        raise InputError(
            f"The input {feature.name!r} is {given.dtype}{list(given.shape)}.", f"{package} takes {feature}."
        )
