"""Samples from a folder of images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qdeploy.errors import InputError, UnavailableError
from qdeploy.samples.preprocessing import EXAMPLE, Preprocessing
from qdeploy.samples.source import Sample, SampleSource, evenly_spaced, how_many

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def open_images(
    folder: Path, input_names: tuple[str, ...], preprocessing: Preprocessing | None, limit: int | None
) -> SampleSource:
    """The images of a folder and its sub-folders, sorted by path, one a sample; under a limit, evenly spaced ones.

    When every image lies in a sub-folder, the first level of sub-folders are the classes. The label is the position of
    the class among all sorted sub-folder names. When all of these names are integers, or start with one and an
    underscore ("289_n02128757", "7"), that integer is the label: data sets that hold only some of the classes keep
    their true indices.

    Raises:
        InputError: No image, no preprocessing, a model with several inputs, or two classes with the same integer.
        UnavailableError: Pillow is not installed.
    """
    _require_pillow()
    name = f"{folder.resolve().name}/"
    files = _image_files(folder)
    if not files:
        raise InputError(f"The folder {folder} holds no images.", f"Images end in {', '.join(SUFFIXES)}.")
    if len(input_names) != 1:
        what = f"The folder {folder} holds images, and the model has the inputs {', '.join(input_names)}."
        raise InputError(what, "Yield all of them from a callable: file.py:callable.")
    if preprocessing is None:
        what = f"The folder {folder} holds images, and nothing says how they become the model's input."
        raise InputError(what, f"Give --preprocess, or preprocessing in the recipe, for example: {EXAMPLE}")
    classes = () if any(len(file.parts) == 1 for file in files) else _class_names(folder)
    labels = _labels(classes)
    picked = [files[i] for i in evenly_spaced(len(files), limit)]
    of_classes = f" in {len(classes)} classes" if classes else ""
    return SampleSource(
        description=f"images in {name} ({how_many(len(picked), len(files), 'files')}{of_classes})",
        stream=partial(_stream, folder, picked, labels, input_names[0], preprocessing),
        size=len(picked),
        preprocessing=preprocessing,
        class_names=classes,
    )


def read_image(path: Path, preprocessing: Preprocessing) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """An image file's bytes, and the model input they become.

    Raises:
        InputError: The file cannot be decoded, or does not suit the preprocessing.
    """
    from PIL import Image

    try:
        content = path.read_bytes()
        with Image.open(BytesIO(content)) as image:
            return np.frombuffer(content, np.uint8), preprocessing.apply(image)
    except InputError as error:
        raise InputError(f"The image {path} does not fit. {error.what}", error.cure) from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"The image {path} cannot be decoded: {error}.", "Mend or remove it.") from error


def _require_pillow() -> None:
    try:
        import PIL  # noqa: F401  # its presence is asked for before any work begins
    except ModuleNotFoundError as error:
        raise UnavailableError("Pillow is not installed.", "Install it: pip install 'qdeploy[images]'") from error


def _image_files(folder: Path) -> list[Path]:
    """Paths relative to the folder, sorted; links are followed, hidden files are left out."""
    return sorted(
        Path(root, name).relative_to(folder)
        for root, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    )


def _class_names(folder: Path) -> tuple[str, ...]:
    """All sub-folders, also those without images: leaving one out would shift the labels behind it."""
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _labels(classes: tuple[str, ...]) -> dict[str, int]:
    indices = [re.fullmatch(r"(\d+)(_.*)?", name) for name in classes]
    labels = {name: int(index[1]) for name, index in zip(classes, indices, strict=True) if index}
    if len(labels) < len(classes):
        return {name: position for position, name in enumerate(classes)}
    by_label: dict[int, str] = {}
    for name, label in labels.items():
        if by_label.setdefault(label, name) != name:
            what = f"The class folders {by_label[label]!r} and {name!r} both stand for label {label}."
            raise InputError(what, "Rename one of them.")
    return labels


def _stream(
    folder: Path, files: Sequence[Path], labels: Mapping[str, int], input_name: str, preprocessing: Preprocessing
) -> Iterator[Sample]:
    for position, file in enumerate(files):
        content, array = read_image(folder / file, preprocessing)
        label = np.array([labels[file.parts[0]]]) if labels else None
        origin = f"sample {position} ({folder.name}/{file.as_posix()})"
        yield Sample({input_name: array}, label, origin, {input_name: content})
