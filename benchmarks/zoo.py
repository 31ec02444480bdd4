"""Small networks with random weights, one of each family that people deploy: for the tests and for benchmarks.

`transformers` builds most of them from configurations of two narrow layers, as a user gets them: no wrappers, outputs
as they come. Random weights decide nothing about accuracy; what they show is whether a family can be exported,
quantized and run, and how close the integers stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.model import TensorSpec

IMAGE, TOKENS, VOCABULARY, CLASSES = 32, 16, 100, 10
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**WIDE, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "use_cache": False}


@dataclass(frozen=True)
class Architecture:
    """One network of the zoo.

    Attributes:
        name: What people call the family.
        build: Gives the module, with the same random weights each time (see `module`).
        inputs: As `--input` takes them.
        sizes: What the dynamic dimensions are in samples.
        classes: The output whose last axis (axis 1 of an image) holds the scores of classes; empty if there is none.
    """

    name: str
    build: Callable[[], Any]
    inputs: tuple[str, ...]
    sizes: Mapping[str, int]
    classes: str = ""

    def module(self) -> Any:
        """The network in evaluation mode, its BatchNorm as training leaves it: the signal stays as strong as it was.

        Networks rely on that; as they are born, their signal fades from layer to layer until nothing is left. A shift
        of 1 keeps most ReLUs open: where they cut at the mean, random networks with BatchNorm amplify any rounding by
        a fifth from layer to layer (Yang et al. 2019, arXiv 1902.08129), which trained ones do not.
        """
        import torch

        torch.manual_seed(0)
        module = self.build().eval()
        norms = [part for part in module.modules() if isinstance(part, torch.nn.BatchNorm2d)]
        if norms:
            for part in module.modules():
                if isinstance(part, torch.nn.Conv2d):
                    torch.nn.init.kaiming_normal_(part.weight)
            for norm in norms:
                norm.reset_parameters()
                torch.nn.init.ones_(norm.bias)
                norm.train().momentum = 1.0
            (batch,) = self.sample(0, {**self.sizes, "batch": 32}).values()
            with torch.no_grad():
                module(torch.from_numpy(batch))
        return module.eval()

    def sample(self, seed: int, sizes: Mapping[str, int] | None = None) -> dict[str, NDArray[Any]]:
        """Inputs: normal values, tokens, or the mask of a sequence that ends before its last token."""
        rng = np.random.default_rng(seed)
        specs = [TensorSpec.parse(text) for text in self.inputs]
        return {spec.name: _values(spec, sizes or self.sizes, rng) for spec in specs}


def _values(spec: TensorSpec, sizes: Mapping[str, int], rng: np.random.Generator) -> NDArray[Any]:
    shape = tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)
    if spec.name == "attention_mask":
        mask = np.ones(shape, spec.dtype)
        mask[:, shape[1] - int(rng.integers(1, 4)) :] = 0
        return mask
    if np.dtype(spec.dtype).kind == "i":
        return rng.integers(1, VOCABULARY, shape).astype(spec.dtype)
    return rng.standard_normal(shape).astype(spec.dtype)


def _bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**WIDE, vocab_size=VOCABULARY, num_labels=CLASSES))


def _distilbert() -> Any:
    from transformers import DistilBertConfig, DistilBertForTokenClassification

    config = DistilBertConfig(vocab_size=VOCABULARY, dim=64, hidden_dim=128, n_layers=2, n_heads=4, num_labels=CLASSES)
    return DistilBertForTokenClassification(config)


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=4, use_cache=False)
    )


def _caching_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**DECODER, "use_cache": True}, num_key_value_heads=2))


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**DECODER, num_key_value_heads=2, num_local_experts=4))


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**DECODER, num_key_value_heads=2))


def _t5_encoder() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4))


def _vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**WIDE, image_size=IMAGE, patch_size=8, num_labels=CLASSES))


def _swin() -> Any:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=IMAGE, patch_size=2, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=CLASSES
    )
    return SwinForImageClassification(config)


def _convnext() -> Any:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1], patch_size=2, num_labels=CLASSES)
    )


def _mobilenet() -> Any:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(
        MobileNetV2Config(image_size=IMAGE, depth_multiplier=0.35, num_labels=CLASSES)
    )


def _efficientnet() -> Any:
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    config = EfficientNetConfig(
        image_size=IMAGE, width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=640, num_labels=CLASSES
    )
    return EfficientNetForImageClassification(config)


def _resnet() -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[2, 2, 2], layer_type="basic", num_labels=CLASSES
    )
    return ResNetForImageClassification(config)


def _segformer() -> Any:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64], decoder_hidden_size=64, num_labels=CLASSES
    )
    return SegformerForSemanticSegmentation(config)


def _wav2vec2() -> Any:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        **WIDE,
        vocab_size=CLASSES,
        conv_dim=(32, 32, 32),
        conv_kernel=(10, 3, 3),
        conv_stride=(5, 2, 2),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    return Wav2Vec2ForCTC(config)


def _whisper_encoder() -> Any:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return WhisperEncoder(
        WhisperConfig(
            num_mel_bins=16,
            d_model=64,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=128,
            max_source_positions=32,
        )
    )


def _unet() -> Any:
    from torch import Tensor, cat, nn

    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        )

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.middle, self.up = block(3, 16), block(16, 32), block(32, 16)
            self.pool, self.widen = nn.MaxPool2d(2), nn.ConvTranspose2d(32, 16, 2, stride=2)
            self.head = nn.Conv2d(16, CLASSES, 1)

        def forward(self, image: Tensor) -> Tensor:
            skip = self.down(image)
            wide = self.widen(self.middle(self.pool(skip)))
            return self.head(self.up(cat([wide, skip], dim=1)))

    return UNet()


def _lstm_tagger() -> Any:
    from torch import Tensor, nn

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(VOCABULARY, 32)
            self.lstm = nn.LSTM(32, 32, batch_first=True, bidirectional=True)
            self.tags = nn.Linear(64, CLASSES)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.tags(self.lstm(self.words(input_ids))[0])

    return Tagger()


_IDS, _MASK = "input_ids=int64[batch,sequence]", "attention_mask=int64[batch,sequence]"
_TEXT = {"batch": 2, "sequence": TOKENS}
_PIXELS = (f"pixel_values=float32[batch,3,{IMAGE},{IMAGE}]",)
_LARGE_PIXELS = ("pixel_values=float32[batch,3,64,64]",)
_BATCH = {"batch": 2}

ZOO = (
    Architecture("BERT", _bert, (_IDS, _MASK), _TEXT, "logits"),
    Architecture("DistilBERT", _distilbert, (_IDS, _MASK), _TEXT, "logits"),
    Architecture("GPT-2", _gpt2, (_IDS,), _TEXT, "logits"),
    Architecture("Llama", _llama, (_IDS,), _TEXT, "logits"),
    Architecture("T5 encoder", _t5_encoder, (_IDS, _MASK), _TEXT),
    Architecture("ViT", _vit, _PIXELS, _BATCH, "logits"),
    Architecture("Swin", _swin, _PIXELS, _BATCH, "logits"),
    Architecture("ConvNeXt", _convnext, _PIXELS, _BATCH, "logits"),
    Architecture("MobileNetV2", _mobilenet, _LARGE_PIXELS, _BATCH, "logits"),
    Architecture("EfficientNet", _efficientnet, _LARGE_PIXELS, _BATCH, "logits"),
    Architecture("ResNet", _resnet, _PIXELS, _BATCH, "logits"),
    Architecture("SegFormer", _segformer, _LARGE_PIXELS, _BATCH, "logits"),
    Architecture(
        "Wav2Vec2", _wav2vec2, ("input_values=float32[batch,samples]",), {"batch": 2, "samples": 800}, "logits"
    ),
    Architecture("Whisper encoder", _whisper_encoder, ("input_features=float32[batch,16,64]",), _BATCH),
    Architecture(
        "U-Net",
        _unet,
        ("image=float32[batch,3,height,width]",),
        {"batch": 2, "height": IMAGE, "width": IMAGE},
        "output",
    ),
    Architecture("LSTM tagger", _lstm_tagger, (_IDS,), _TEXT, "output"),
)
"""In the order of the tables."""

REFUSED = (
    Architecture("Llama with a cache", _caching_llama, (_IDS,), _TEXT),
    Architecture("Mixtral", _mixtral, (_IDS,), _TEXT),
)
"""What cannot be exported, and says why: a cache among the outputs, and an operator without a counterpart in ONNX."""
