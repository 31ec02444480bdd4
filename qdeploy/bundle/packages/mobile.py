"""What packages for phones share: code from templates, literals and names, and golden samples that need no library.

golden/golden.json       how many samples; name, type, shape and file of inputs and outputs; tolerances of these
golden/input-<i>.bin     an input's values, sample after sample, little-endian, row-major; likewise output-<i>.bin
golden/image-<i>         the image file that sample i was made of, if it was made of one
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.bundle.packages.shipped import shipped
from qdeploy.errors import InputError
from qdeploy.model import TensorSpec
from qdeploy.samples.preprocessing import Preprocessing

if TYPE_CHECKING:
    from qdeploy.bundle.manifest import Manifest


@dataclass(frozen=True)
class GoldenTensor:
    """An input or output of the golden samples.

    Attributes:
        name: Of the model's input or output.
        arrays: One a sample, of one shape and type.
        tolerance: How far an output may be off; None for an input.
    """

    name: str
    arrays: Sequence[NDArray[Any]]
    tolerance: float | None = None


def write_templates(platform: str, paths: Collection[str], values: Mapping[str, str], folder: Path) -> None:
    """Write templates to their own paths in a package, each `{{key}}` replaced by the key's value."""
    for path in paths:
        template = shipped(f"templates/{platform}/{path}")
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template), "utf-8")


def words_of(name: str) -> list[str]:
    """The parts of a bundle's name that can stand in an identifier."""
    return re.findall(r"[A-Za-z0-9]+", name)


def literal(number: float) -> str:
    """The shortest decimal of the float32 next to a number."""
    return str(np.float32(number))


def text_literal(text: str) -> str:
    """A string between quotation marks, as Kotlin and Swift read it."""
    return json.dumps(text, ensure_ascii=False)


def tensors_text(specs: Sequence[TensorSpec]) -> str:
    """Inputs or outputs as a README names them."""
    return "; ".join(f"`{spec}`" for spec in specs)


def pixel_step(preprocessing: Preprocessing) -> float:
    """How far a step of one pixel value moves the model's input at most."""
    return abs(preprocessing.scale) / min(map(abs, preprocessing.std))


def image_note(manifest: Manifest, preprocessing: Preprocessing | None) -> str:
    """What a README says of the model's preprocessing."""
    if preprocessing is not None:
        return (
            "\nThe code resizes, crops and scales as the bundle does, with the same rounding. Decoders may differ: in "
            "a JPEG by\na step of a color, in files with a color profile or with transparency by more.\n"
        )
    if manifest.preprocessing is not None:
        return "\nTexts and sounds are prepared by your own code: the golden inputs are there to compare with.\n"
    return ""


def write_golden(
    folder: Path,
    inputs: Sequence[GoldenTensor],
    outputs: Sequence[GoldenTensor],
    types: Mapping[str, str],
    images: tuple[Sequence[NDArray[Any]], float] | None,
) -> None:
    """Write golden samples as files that code on any platform reads.

    Args:
        folder: To come.
        inputs: One or more.
        outputs: Likewise.
        types: The platform's names of numpy's types.
        images: The image files that the first input was made of, and how far a step of a pixel moves it.

    Raises:
        InputError: An array has none of the types.
    """
    folder.mkdir(parents=True)
    content: dict[str, Any] = {"samples": len(inputs[0].arrays)}
    for kind, tensors in (("input", inputs), ("output", outputs)):
        content[f"{kind}s"] = [_written(t, folder / f"{kind}-{i}.bin", types) for i, t in enumerate(tensors)]
    if images is not None:
        files, content["images"] = images[0], {"step": images[1]}
        for i, file in enumerate(files):
            (folder / f"image-{i}").write_bytes(file.tobytes())
    (folder / "golden.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _written(tensor: GoldenTensor, path: Path, types: Mapping[str, str]) -> dict[str, Any]:
    """Write a tensor's values; what golden.json says of it."""
    first = tensor.arrays[0]
    if first.dtype.name not in types:
        what = f"{tensor.name!r} is of type {first.dtype}, which the package's test does not read."
        raise InputError(what, f"Export a model whose inputs and outputs are {', '.join(types)}.")
    path.write_bytes(b"".join(array.astype(array.dtype.newbyteorder("<")).tobytes() for array in tensor.arrays))
    tolerance = {} if tensor.tolerance is None else {"tolerance": tensor.tolerance}
    return {
        "name": tensor.name,
        "type": types[first.dtype.name],
        "shape": list(first.shape),
        "file": path.name,
        **tolerance,
    }
