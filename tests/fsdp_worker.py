"""What each process of the tests of FSDP2 does; a module of its own, because spawned processes import it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

import etp_graph as etp

STEPS, PRUNE, BATCH = 4, 2, 8
TIMEOUT = timedelta(seconds=60)
"""A process that waits longer for another one fails, and with it the test: the suite never stands still."""


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


@dataclass(frozen=True)
class Case:
    """One model and what to do with it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Tensor]
    layers: Callable[[nn.Module], list[nn.Module]]
    prune: tuple[str, ...] | None = None


CASES = {
    "cnn": Case(cnn, pictures, lambda m: [m[0], m[2]]),  # type: ignore[index]
    "bert": Case(bert, tokens, lambda m: list(m.bert.encoder.layer), ("heads", "neurons")),  # type: ignore
    "llama": Case(llama, tokens, lambda m: list(m.model.layers), ("heads", "neurons")),  # type: ignore
}
