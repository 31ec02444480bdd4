"""How an image file becomes the model's input: x = (pixel * SCALE - MEAN) / STD, float32, a batch of one."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

RESIZE: int | None = 256  # pixels of the shorter side, bilinear, aspect kept; None leaves the size
CROP: tuple[int, int] | None = (224, 224)  # height and width of the central rectangle; None keeps all
COLOR: str = "rgb"  # order of the channels: rgb, bgr or gray
LAYOUT: str = "nchw"  # order of the axes: nchw or nhwc
SCALE: float = 1 / 255  # factor on pixel values from 0 to 255
MEAN: tuple[float, ...] = (0.485, 0.456, 0.406)  # one number, or one a channel
STD: tuple[float, ...] = (0.229, 0.224, 0.225)


def preprocess(content: bytes) -> Any:
    """The input for the bytes of an image file."""
    with Image.open(BytesIO(content)) as image:
        return prepared(image)


def prepared(image: Image.Image) -> Any:
    """The input for an image."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"The image has more than 8 bits a channel (mode {image.mode}): convert it first.")
    image = cropped(resized(image.convert("L" if COLOR == "gray" else "RGB")))
    pixels = np.asarray(image, np.float32).reshape(image.height, image.width, -1)
    if COLOR == "bgr":
        pixels = pixels[..., ::-1]
    x = (pixels * np.float32(SCALE) - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return np.ascontiguousarray(x.transpose(2, 0, 1) if LAYOUT == "nchw" else x)[np.newaxis]


def resized(image: Image.Image) -> Image.Image:
    """The image with its shorter side RESIZE pixels long; the longer one is rounded down."""
    if RESIZE is None:
        return image
    shorter = min(image.size)
    width, height = (RESIZE if side == shorter else int(RESIZE * side / shorter) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def cropped(image: Image.Image) -> Image.Image:
    """The central CROP of the image."""
    if CROP is None:
        return image
    height, width = CROP
    if image.width < width or image.height < height:
        raise ValueError(
            f"The image's {image.width}x{image.height} pixels are fewer than the crop of {width}x{height}."
        )
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
