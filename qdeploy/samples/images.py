"""Samples from a folder of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qdeploy.errors import InputError, UnavailableError
from qdeploy.samples.folders import SampleFolder, open_folder
from qdeploy.samples.preprocessing import EXAMPLE, Preprocessing
from qdeploy.samples.source import Sample, SampleSource, evenly_spaced

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def open_images(
    folder: Path, input_names: tuple[str, ...], preprocessing: Preprocessing | None, limit: int | None
) -> SampleSource:
    """The images of a folder and its sub-folders, sorted by path, one a sample; under a limit, evenly spaced ones.

    Raises:
        InputError: No image, no preprocessing, a model with several inputs, or two classes with the same integer.
        UnavailableError: Pillow is not installed.
    """
    require_pillow()
    images = open_folder(folder, SUFFIXES)
    if not images.files:
        raise InputError(f"The folder {folder} holds no images.", f"Images end in {', '.join(SUFFIXES)}.")
    if len(input_names) != 1:
        what = f"The folder {folder} holds images, and the model has the inputs {', '.join(input_names)}."
        raise InputError(what, "Yield all of them from a callable: file.py:callable.")
    if preprocessing is None:
        what = f"The folder {folder} holds images, and nothing says how they become the model's input."
        raise InputError(what, f"Give --preprocess, or preprocessing in the recipe, for example: {EXAMPLE}")
    picked = [images.files[i] for i in evenly_spaced(len(images.files), limit)]
    places = list(enumerate(picked))
    read = partial(_stream, images, input_names[0], preprocessing)
    return SampleSource(
        description=f"images in {images.name} ({images.contents(len(picked))})",
        stream=partial(read, places),
        pick=lambda part: read([places[i] for i in part]),
        size=len(picked),
        preprocessing=preprocessing,
        class_names=images.classes,
    )


def read_image(path: Path, preprocessing: Preprocessing) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """An image file's bytes, and the model input they become.

    Raises:
        InputError: The file cannot be decoded, or does not suit the preprocessing.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        content = path.read_bytes()
        with Image.open(BytesIO(content)) as image:
            return np.frombuffer(content, np.uint8), preprocessing.apply(image)
    except InputError as error:
        raise InputError(f"The image {path} does not fit. {error.what}", error.cure) from error
    except UnidentifiedImageError as error:
        raise InputError(f"The file {path} is no image of a known format.", "Mend or remove it.") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"The image {path} cannot be decoded: {error}.", "Mend or remove it.") from error


def require_pillow() -> None:
    """Refuse, before any work, to go on without what decodes images.

    Raises:
        UnavailableError: It is not installed.
    """
    try:
        import PIL  # noqa: F401  # its presence is asked for before any work begins
    except ModuleNotFoundError as error:
        raise UnavailableError("Pillow is not installed.", "Install it: pip install 'qdeploy[images]'") from error


def _stream(
    folder: SampleFolder, input_name: str, preprocessing: Preprocessing, places: Sequence[tuple[int, Path]]
) -> Iterator[Sample]:
    for position, file in places:
        content, array = read_image(folder.path / file, preprocessing)
        yield Sample({input_name: array}, folder.label(file), folder.origin(position, file), {input_name: content})
