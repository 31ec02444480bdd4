"""Running a package: by Core ML itself on macOS, by our interpreter of the saved package elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from qdeploy.backend import Arrays, Evidence, Runner
from qdeploy.backends.coreml.package import PROBABILITIES, Interface, interface_of, read_specification
from qdeploy.backends.coreml.tools import coremltools, quiet
from qdeploy.errors import InputError, InternalError
from qdeploy.model import ImageInput, TensorSpec

Units = Literal["all", "cpu-only", "cpu-and-gpu", "cpu-and-ne"]
"""Where Core ML may compute."""

PIXEL_ERROR = 0.01
"""How far from a whole number a pixel may come out of the model's own inputs."""


class PackageRunner(Runner):
    """What both runners share: names, types and pixels between the model and its package."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._interface: Interface | None = None
        self._loaded: Any = None

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by the model's names, in the model's types.

        Raises:
            InputError: The inputs are not those that the model takes.
        """
        if self._loaded is None or self._interface is None:
            message = f"the runner of {self._path.name} is used outside `with`"
            raise InternalError(message)
        taken = self._interface.inputs
        for spec in taken.values():
            wrong = spec.mismatch(inputs[spec.name].dtype.name, inputs[spec.name].shape) if spec.name in inputs else ""
            if wrong or spec.name not in inputs:
                cure = f"The model takes {', '.join(map(str, taken.values()))}."
                raise InputError(f"The input {spec.name!r} {wrong or 'is missing'}.", cure)
        given = {name: self._given(name, inputs[spec.name], self._interface) for name, spec in taken.items()}
        outputs = self._predict(given)
        if self._interface.labels:
            outputs = {
                name: _scores(outputs[PROBABILITIES], self._interface.labels) for name in self._interface.outputs
            }
        return {spec.name: _as(outputs[name], spec) for name, spec in self._interface.outputs.items()}

    def _given(self, name: str, array: NDArray[Any], interface: Interface) -> NDArray[Any]:
        if interface.image is not None and name in interface.images:
            return self._pixels(array, interface.image)
        return np.atleast_1d(array).astype(np.int32 if array.dtype.kind in "iu" else np.float32)

    def _pixels(self, x: NDArray[Any], image: ImageInput) -> NDArray[np.float32]:
        """The pixels that the model's input was made of: (x − bias) / scale."""
        scale, bias = (np.array(v, np.float64).reshape(1, -1, 1, 1) for v in (image.scale, image.bias))
        pixels = (x - bias) / scale
        whole = np.clip(np.rint(pixels), 0, 255)
        if np.abs(pixels - whole).max() > PIXEL_ERROR:
            what = "The package takes pixels, and these inputs were not made of whole ones from 0 to 255."
            raise InputError(what, "Give images, or build it without coreml.image.")
        return whole.astype(np.float32)

    def _predict(self, arrays: Mapping[str, NDArray[Any]]) -> Mapping[str, Any]:
        raise NotImplementedError

    def _load(self) -> Any:
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._interface = interface_of(read_specification(self._path))
        self._loaded = self._load()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loaded = None


def _as(output: Any, spec: TensorSpec) -> NDArray[Any]:
    """In the model's type; Core ML has no scalars, and gives vectors of one value."""
    array = np.asarray(output)
    surplus = tuple(range(array.ndim - len(spec.shape)))
    return array.squeeze(surplus).astype(spec.dtype)


def _scores(given: Any, labels: tuple[str, ...]) -> Any:
    """A classifier's scores in the order of the labels: Core ML gives them by label."""
    return [[given[label] for label in labels]] if isinstance(given, Mapping) else [given]


class Interpreted(PackageRunner):
    """The saved package, run by our interpreter."""

    evidence = Evidence.INTERPRETED

    def _load(self) -> Any:
        from qdeploy.backends.coreml.interpreter import load_package

        return load_package(self._path)

    def _predict(self, arrays: Mapping[str, NDArray[Any]]) -> Mapping[str, Any]:
        outputs: Mapping[str, Any] = self._loaded.run(dict(arrays))
        return outputs


class Executed(PackageRunner):
    """The saved package, run by Core ML."""

    evidence = Evidence.EXECUTED

    def __init__(self, path: Path, units: Units) -> None:
        super().__init__(path)
        self._units = units

    def _load(self) -> Any:
        ct = coremltools()
        units = ct.ComputeUnit[self._units.upper().replace("-", "_")]
        with quiet():
            return ct.models.MLModel(str(self._path), compute_units=units)

    def _predict(self, arrays: Mapping[str, NDArray[Any]]) -> Mapping[str, Any]:
        assert self._interface is not None
        images = self._interface.images
        given = {name: _picture(array) if name in images else array for name, array in arrays.items()}
        outputs: Mapping[str, Any] = self._loaded.predict(given)
        return outputs


def _picture(pixels: NDArray[Any]) -> Any:
    """[1, channels, height, width] as a PIL image."""
    from PIL import Image

    channels = pixels[0].astype(np.uint8)
    return Image.fromarray(channels[0] if len(channels) == 1 else np.ascontiguousarray(channels.transpose(1, 2, 0)))
