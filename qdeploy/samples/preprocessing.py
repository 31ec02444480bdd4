"""How an image becomes a model input: resize, crop, scale, normalize."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from qdeploy.errors import InputError
from qdeploy.model import ImageInput
from qdeploy.registry import suggestion
from qdeploy.samples.settings import Conversions, converted, key_values

if TYPE_CHECKING:
    from PIL.Image import Image

EXAMPLE = "resize=256 crop=224 mean=0.485,0.456,0.406 std=0.229,0.224,0.225"
PIL_MODES = {"rgb": "RGB", "bgr": "RGB", "gray": "L"}


@dataclass(frozen=True)
class Preprocessing:
    """x = (pixel · scale − mean) / std in float32, a batch of one image.

    Sizes round as torchvision's Resize and CenterCrop do on PIL images, so that a model sees what it was trained on.

    Attributes:
        resize: Length in pixels that the shorter side gets (bilinear, aspect kept); None leaves the size.
        crop: Side of the central square, or (height, width) of the central rectangle; None keeps all.
        scale: Factor on the pixel values 0 to 255.
        mean: Subtracted after scaling; one number, or one a channel in the order of `color`.
        std: Divided by; one number, or one a channel in the order of `color`.
        layout: Order of the axes.
        color: Order of the channels; "gray" has one.
    """

    shaping: ClassVar[str] = "resize, crop, color, layout"

    resize: int | None = None
    crop: int | tuple[int, int] | None = None
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Literal["nchw", "nhwc"] = "nchw"
    color: Literal["rgb", "bgr", "gray"] = "rgb"

    def __post_init__(self) -> None:
        for name, value, known in (("layout", self.layout, ["nchw", "nhwc"]), ("color", self.color, list(PIL_MODES))):
            if value not in known:
                raise InputError(f"The preprocessing's {name} cannot be {value!r}.", suggestion(value, known))
        for name, length in (("resize", self.resize), ("crop", self.crop_size and min(self.crop_size))):
            if length is not None and length < 1:
                raise InputError(f"The preprocessing's {name} is {length} pixels.", "Give at least 1.")
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) not in (1, self.channels):
                what = (
                    f"The preprocessing's {name} has {len(numbers)} numbers; {self.color} has {self.channels} channels."
                )
                raise InputError(what, "Give one number, or one a channel.")
        if not all(map(math.isfinite, (self.scale, *self.mean, *self.std))) or 0 in self.std or self.scale == 0:
            raise InputError(
                f"The preprocessing cannot be computed: {self}.", "Give finite numbers, scale and std not 0."
            )

    @property
    def channels(self) -> int:
        """Channels of the model input."""
        return 1 if self.color == "gray" else 3

    @property
    def crop_size(self) -> tuple[int, int] | None:
        """Height and width of the crop, if there is one."""
        return (self.crop, self.crop) if isinstance(self.crop, int) else self.crop

    @classmethod
    def parse(cls, text: str) -> Preprocessing:
        """From `key=value` words, for example "resize=256 crop=224 scale=1/255 mean=0.5 std=0.5".

        Lists are separated by commas; a crop of two numbers is height,width.

        Raises:
            InputError: A word without "=", an unknown key, or a value that does not fit.
        """
        values = {
            key: value if key in ("layout", "color") else value.split(",")
            for key, value in key_values(text, EXAMPLE).items()
        }
        return cls.from_json(values)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Preprocessing:
        """From what `to_json` gave, or the same settings as a table of a recipe; those left out keep their defaults.

        Raises:
            InputError: An unknown key, or a value that does not fit.
        """
        return cls(**converted("preprocessing", values, _CONVERSIONS, EXAMPLE))

    def to_json(self) -> dict[str, Any]:
        """All settings as plain JSON values, from which `from_json` makes an equal object."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def image_input(self) -> ImageInput | None:
        """The part that is done on the pixels of a prepared image; None where the channels come last."""
        if self.layout != "nchw":
            return None
        mean, std = (numbers * self.channels if len(numbers) == 1 else numbers for numbers in (self.mean, self.std))
        scale = tuple(self.scale / s for s in std)
        bias = tuple(-m / s for m, s in zip(mean, std, strict=True))
        return ImageInput(scale, bias, self.color)

    def apply(self, image: Image) -> NDArray[np.float32]:
        """The model input for a PIL image, float32 [1, C, H, W] or [1, H, W, C].

        Raises:
            InputError: The image is smaller than the crop, or its pixels have more than 8 bits.
        """
        if image.mode.startswith(("I", "F")):  # conversion would clip all above 255
            raise InputError(
                f"Its pixels have more than 8 bits (mode {image.mode}).", "Convert it to 8 bits a channel."
            )
        pixels = np.asarray(self._cropped(self._resized(image.convert(PIL_MODES[self.color]))), np.float32)
        pixels = pixels.reshape(*pixels.shape[:2], self.channels)
        if self.color == "bgr":
            pixels = pixels[..., ::-1]
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        x = (pixels * np.float32(self.scale) - mean) / std
        return np.ascontiguousarray(x.transpose(2, 0, 1) if self.layout == "nchw" else x)[np.newaxis]

    def _resized(self, image: Image) -> Image:
        from PIL.Image import Resampling

        if self.resize is None:
            return image
        shorter = min(image.size)
        width, height = (self.resize if side == shorter else int(self.resize * side / shorter) for side in image.size)
        return image.resize((width, height), Resampling.BILINEAR)

    def _cropped(self, image: Image) -> Image:
        if self.crop_size is None:
            return image
        height, width = self.crop_size
        if image.width < width or image.height < height:
            what = f"Its {image.width}×{image.height} pixels are fewer than the crop of {width}×{height}."
            raise InputError(what, "Set resize in the preprocessing, or make the crop smaller.")
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))


def _number(value: Any) -> float:
    if isinstance(value, list | tuple):
        (value,) = value
    return float(Fraction(value))


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(map(_number, value)) if isinstance(value, list | tuple) else (_number(value),)


def _pixels(value: Any) -> int:
    (number,) = _numbers(value)
    if not number.is_integer():
        raise ValueError(number)
    return int(number)


def _crop(value: Any) -> int | tuple[int, int]:
    if isinstance(value, list | tuple) and len(value) == 2:
        return _pixels(value[0]), _pixels(value[1])
    return _pixels(value)


_CONVERSIONS: Conversions = {
    "resize": _pixels,
    "crop": _crop,
    "scale": _number,
    "mean": _numbers,
    "std": _numbers,
    "layout": str,
    "color": str,
}
