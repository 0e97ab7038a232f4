"""A small Llama, a tokenizer of characters and a text, for the benchmarks of language models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.llm import texts

VOCABULARY = 64


def tokenize(text: str, **options: Any) -> dict[str, Tensor]:
    """One token for each character."""
    return {"input_ids": torch.tensor([[ord(c) % VOCABULARY for c in text]])}


def build() -> Any:
    """Five layers, so that a fifth of the blocks is one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def use_toy(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Let a benchmark take this model and short windows of a made text."""
    text = "".join(chr(33 + (i * i + i // 7) % 60) for i in range(4000))
    monkeypatch.setattr(texts, "read_text", lambda part: text)
    monkeypatch.setattr(texts, "LENGTH", 16)
    monkeypatch.setattr(module, "load_smollm2", lambda: (build(), tokenize))
