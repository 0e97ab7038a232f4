"""Small language models of transformers with packed experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

EXPERTS, NEURONS, WIDTH = 4, 24, 32

MIXTURES = ["Mixtral", "Olmoe", "Qwen3Moe", "GptOss", "Phimoe", "Ernie4_5_Moe"]


def mixture(family: str, implementation: str) -> Any:
    """Return a model of one layer with random weights, whose experts run in one of transformers' ways."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=NEURONS, moe_intermediate_size=NEURONS, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts_per_tok=2, decoder_sparse_step=1,
        num_local_experts=EXPERTS, num_experts=EXPERTS, moe_num_experts=EXPERTS, moe_k=2, moe_layer_start_index=0,
        moe_num_shared_experts=1, layer_types=["full_attention"], use_cache=False, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, experts_implementation=implementation,
    )  # fmt: skip
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def experts_of(model: Any) -> tuple[str, Any]:
    """Return the name and the module of the experts."""
    return next((name, part) for name, part in model.named_modules() if name.endswith(".experts"))


def tokens(count: int = 4) -> list[dict[str, Tensor]]:
    """Return batches of 8 x 16 tokens."""
    return [{"input_ids": torch.randint(3, 64, (8, 16))} for _ in range(count)]
