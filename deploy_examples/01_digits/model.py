"""A small convolutional network for handwritten digits, and the samples to calibrate and evaluate it with."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch  # noqa: TID253  a model file needs torch whenever it is read
from numpy.typing import NDArray
from torch import nn  # noqa: TID253  likewise

WEIGHTS = Path(__file__).with_name("weights.pt")

Sample = tuple[dict[str, NDArray[np.float32]], NDArray[np.int64]]


def separable(channels: int, out_channels: int) -> nn.Sequential:
    """A depthwise 3×3 convolution with stride 2, then a pointwise one."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class DigitNet(nn.Module):
    """Image [batch, 1, 8, 8] with values from 0 to 1 → logits [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.separable = separable(32, 64)
        self.residual = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64))
        self.classifier = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits of the ten digits."""
        x = self.separable(self.stem(image))
        x = torch.relu(x + self.residual(x))
        return self.classifier(x.mean(dim=(2, 3)))


def build() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """The trained network, ready for inference, and example inputs."""
    model = DigitNet()
    model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return model.eval(), (torch.zeros(1, 1, 8, 8),)


def splits() -> dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Images [n, 1, 8, 8] and labels [n] of the three parts, which share no image."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    parts = zip(("evaluation", "calibration", "training"), np.split(order, [450, 650]), strict=True)
    return {name: (images[part], digits.target[part]) for name, part in parts}


def calibration() -> Iterator[Sample]:
    """200 images that the network was not trained on, one at a time."""
    return samples("calibration")


def evaluation() -> Iterator[Sample]:
    """The 450 images that neither training nor calibration sees, one at a time."""
    return samples("evaluation")


def samples(part: str) -> Iterator[Sample]:
    """One part's images with their labels."""
    images, labels = splits()[part]
    for i in range(len(images)):
        yield {"image": images[i : i + 1]}, labels[i : i + 1]
