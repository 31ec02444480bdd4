"""A Swift package: the .mlpackage, Swift code that runs it on Core ML, and a test on the golden samples.

Package.swift
Sources/        model.mlpackage, Model.swift; for a bundle measured on images Preprocessing.swift, Images.swift, and
                Normalization.swift with ArrayInput.swift, or PixelInput.swift for a package that takes pixels
Tests/          Golden.swift, GoldenTests.swift, ImagesTests.swift and the golden samples
README.md, qdeploy-package.json, SHA256SUMS
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.bundle.golden import GoldenSample, read_golden
from qdeploy.bundle.load import Bundle, open_bundle
from qdeploy.bundle.packages.mobile import (
    GoldenTensor,
    image_note,
    literal,
    pixel_step,
    tensors_text,
    text_literal,
    words_of,
    write_golden,
    write_templates,
)
from qdeploy.bundle.packages.package import chosen, writing_package
from qdeploy.bundle.packages.shipped import image_preprocessing
from qdeploy.bundle.verify import allowed
from qdeploy.errors import UnavailableError
from qdeploy.model import ImageInput
from qdeploy.samples.preprocessing import Preprocessing

if TYPE_CHECKING:
    from qdeploy.bundle.manifest import BundledTarget

TAKES = ("coreml",)
"""Backends whose artifacts Core ML runs."""

TYPES: Mapping[str, str] = MappingProxyType({name: name for name in ("float32", "int32", "uint8")})
"""What Core ML takes and gives; uint8 is pixels."""

UNITS: Mapping[str, str] = MappingProxyType(
    {"all": "all", "cpu-only": "cpuOnly", "cpu-and-gpu": "cpuAndGPU", "cpu-and-ne": "cpuAndNeuralEngine"}
)
"""MLComputeUnits' names of the places where Core ML may compute."""

SPECIFICATION = "Data/com.apple.CoreML/model.mlmodel"
INTERFACE = "qdeploy.interface"
"""Where the backend's packages say which of their names stands for which of the model's."""

PROBABILITIES = "classLabel_probs"
"""What a classifier gives in place of the model's output."""

PIXEL_CASE = """
            case "uint8":
                let pixels = try stored(UInt8.self, sample)
                return try input(Pixels(width: shape[1], height: shape[0], channels: shape[2], values: pixels))"""
"""How Swift makes an input of golden pixels."""


@dataclass(frozen=True)
class Names:
    """How a package calls the model's inputs and outputs, by the model's own names."""

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


def package_ios(path: Path, output: Path, *, target: str | None = None, force: bool = False) -> None:
    """Write one target of a bundle as a Swift package.

    Args:
        path: The bundle.
        output: The folder to come.
        target: A folder of the bundle or a backend; None for the first that Core ML runs.
        force: It may replace an earlier output.

    Raises:
        InputError: The bundle is damaged, has no such target, or the output may not be written.
        UnavailableError: coremltools, which reads the .mlpackage, is not installed.
    """
    if find_spec("coremltools") is None:
        raise UnavailableError("coremltools is not installed.", "Install it: pip install 'qdeploy[coreml]'")
    bundle = open_bundle(path)
    entry = chosen(bundle, [target] if target else [], TAKES, "An iOS package")[0]
    source = path / entry.folder / entry.main
    golden = read_golden(bundle)
    preprocessing = image_preprocessing(bundle.manifest)
    pixels = preprocessing.image_input() if preprocessing is not None and entry.options.get("image") else None
    with writing_package(bundle, "ios", [entry], output, force=force) as folder:
        shutil.copytree(source, folder / "Sources/model.mlpackage")
        if golden:
            _write_golden(golden, entry, preprocessing, pixels, folder / "Tests/golden")
        values = {
            **_values(bundle, entry, _names(source)),
            **_image_values(bundle, preprocessing, pixels),
            **_test_values(golden, bundle, pixels),
        }
        write_templates("ios", _templates(golden, preprocessing, pixels), values, folder)


def _names(package: Path) -> Names:
    """Read them from a package."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)  # it warns of what only converting and a Mac need
    from coremltools.proto import Model_pb2

    model = Model_pb2.Model()
    model.ParseFromString((package / SPECIFICATION).read_bytes())
    interface = json.loads(model.description.metadata.userDefined[INTERFACE])
    inputs, outputs = ({each["name"]: each["package"] for each in interface[part]} for part in ("inputs", "outputs"))
    return Names(inputs, dict.fromkeys(outputs, PROBABILITIES) if interface["labels"] else outputs)


def _write_golden(
    golden: Sequence[GoldenSample],
    entry: BundledTarget,
    preprocessing: Preprocessing | None,
    pixels: ImageInput | None,
    folder: Path,
) -> None:
    inputs = [GoldenTensor(name, [_taken(sample.inputs[name]) for sample in golden]) for name in golden[0].inputs]
    if pixels is not None:
        inputs = [GoldenTensor(each.name, [pixels_of(array, pixels) for array in each.arrays]) for each in inputs]
    outputs = [
        GoldenTensor(name, [_taken(sample.outputs[entry.folder][name]) for sample in golden], tolerance)
        for name, tolerance in allowed(golden, entry.folder).items()
    ]
    images = None
    if preprocessing is not None:
        step = 1.0 if pixels is not None else pixel_step(preprocessing)
        images = [file for sample in golden for file in sample.raw.values()], step
    write_golden(folder, inputs, outputs, TYPES, images)


def _taken(array: NDArray[Any]) -> NDArray[Any]:
    """An array in the types and shapes that Core ML has."""
    return np.atleast_1d(array).astype(np.int32 if array.dtype.kind in "iu" else np.float32)


def pixels_of(array: NDArray[Any], image: ImageInput) -> NDArray[np.uint8]:
    """The pixels [height, width, channels], red first, of which an input [1, channels, height, width] was made."""
    scale, bias = (np.array(numbers, np.float64).reshape(-1, 1, 1) for numbers in (image.scale, image.bias))
    pixels = np.clip(np.rint((array[0] - bias) / scale), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    return np.ascontiguousarray(pixels[..., ::-1] if image.color == "bgr" else pixels)


def _templates(
    golden: Sequence[GoldenSample], preprocessing: Preprocessing | None, pixels: ImageInput | None
) -> list[str]:
    paths = ["Package.swift", "README.md", "Sources/Model.swift"]
    if preprocessing is not None:
        paths += ["Sources/Preprocessing.swift", "Sources/Images.swift"]
        kind = ("Normalization", "ArrayInput") if pixels is None else ("PixelInput",)
        paths += [f"Sources/{name}.swift" for name in kind]
    if golden:
        paths += ["Tests/Golden.swift", "Tests/GoldenTests.swift"]
    if golden and preprocessing is not None:
        paths.append("Tests/ImagesTests.swift")
    return paths


def _values(bundle: Bundle, entry: BundledTarget, names: Names) -> dict[str, str]:
    """What stands in the templates of every package."""
    manifest = bundle.manifest
    return {
        "title": f"{bundle.path.resolve().name} ({entry.target}:{entry.precision})",
        "module": _module(bundle),
        "units": UNITS[str(entry.options.get("units", "all"))],
        "qdeploy": manifest.qdeploy,
        "inputs": tensors_text(manifest.inputs),
        "outputs": tensors_text(manifest.outputs),
        "input_names": _dictionary(names.inputs),
        "output_names": _dictionary(names.outputs),
        "input": text_literal(manifest.inputs[0].name),
        "output": text_literal(manifest.outputs[0].name),
    }


def _module(bundle: Bundle) -> str:
    return "".join(["Model", *(word[0].upper() + word[1:] for word in words_of(bundle.path.resolve().name))])


def _dictionary(entries: Mapping[str, str]) -> str:
    return ", ".join(f"{text_literal(key)}: {text_literal(value)}" for key, value in entries.items())


def _image_values(bundle: Bundle, preprocessing: Preprocessing | None, pixels: ImageInput | None) -> dict[str, str]:
    """What stands in the templates because of the preprocessing."""
    note = image_note(bundle.manifest, preprocessing)
    if preprocessing is None:
        return {"code": "`Model.swift`", "argument": "inputs", "image_note": note}
    last = "`PixelInput.swift`" if pixels is not None else "`Normalization.swift`, `ArrayInput.swift`"
    return {
        "code": f"`Model.swift`, `Images.swift`, `Preprocessing.swift` with the settings at its top, {last}",
        "argument": "image",
        "image_note": note,
        **_settings(preprocessing),
    }


def _settings(preprocessing: Preprocessing) -> dict[str, str]:
    """The preprocessing as Swift's literals."""
    crop = preprocessing.crop_size
    return {
        "resize": str(preprocessing.resize or "nil"),
        "crop": f"({crop[0]}, {crop[1]})" if crop else "nil",
        "gray": "true" if preprocessing.color == "gray" else "false",
        "color": preprocessing.color,
        "layout": preprocessing.layout,
        "scale": literal(preprocessing.scale),
        "mean": ", ".join(map(literal, preprocessing.mean)),
        "std": ", ".join(map(literal, preprocessing.std)),
    }


def _test_values(golden: Sequence[GoldenSample], bundle: Bundle, pixels: ImageInput | None) -> dict[str, str]:
    """What stands in the templates because of the tests."""
    module = _module(bundle)
    target = f"""
        .testTarget(
            name: "{module}Tests", dependencies: ["{module}"], path: "Tests", resources: [.copy("golden")]),"""
    return {
        "test_target": target if golden else "",
        "tests": "the tests, and the golden samples" if golden else "nothing: the bundle holds no golden samples",
        "pixel_case": PIXEL_CASE if pixels is not None else "",
        "values": "image.values" if pixels is not None else "normalized(image).values",
    }
