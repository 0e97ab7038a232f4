"""Small models and their inputs for the tests of FSDP2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BATCH = 8


def cnn() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 10, 3), nn.GELU(), nn.Conv2d(10, 7, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(7, 4),
    )  # fmt: skip


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(1)
    return BertForSequenceClassification(BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=4, intermediate_size=12, num_labels=4,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))  # fmt: skip


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(1)
    return LlamaForSequenceClassification(LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=12, num_labels=4, max_position_embeddings=8, use_cache=False, pad_token_id=0,
    ))  # fmt: skip


def pictures(generator: torch.Generator) -> Tensor:
    return torch.randn(BATCH, 2, 8, 8, generator=generator)


def tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(1, 20, (BATCH, 6), generator=generator)
