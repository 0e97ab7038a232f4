"""Small decoders of transformers in folders, and batches of tokens for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 64

_SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}

_LLAMA = {**_SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}

CAUSAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "head_dim": 8}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_LLAMA, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_LLAMA, "head_dim": 8, "sliding_window": 6}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**_LLAMA, "pad_token_id": 0, "eos_token_id": 1}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64, "bos_token_id": 0,
        "eos_token_id": 1,
    }),
    "opt": ("OPTForCausalLM", "OPTConfig", {
        **_SHAPE, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    }),
    "gpt_neo": ("GPTNeoForCausalLM", "GPTNeoConfig", {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]], "bos_token_id": 0, "eos_token_id": 1,
    }),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_SHAPE, "intermediate_size": 48}),
}  # fmt: skip
"""Class, class of the configuration, and its values."""


def build_causal(family: str) -> Any:
    """Return a model whose biases and norms are not those of a new model, and whose weights are large."""
    import transformers

    name, config, values = CAUSAL[family]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(5)
    return model


def write_causal(folder: Path, family: str = "llama", **options: Any) -> Path:
    """Write such a model to a folder; ``options`` are those of ``save_pretrained``."""
    build_causal(family).save_pretrained(folder, **options)
    return folder


def token_batches(count: int = 2) -> list[dict[str, Any]]:
    """Return batches of tokens, every second one with padding on the left."""
    found: list[dict[str, Any]] = []
    for number in range(count):
        batch: dict[str, Any] = {"input_ids": torch.randint(3, VOCABULARY, (4, 16))}
        if number % 2 == 0:
            batch["attention_mask"] = torch.ones(4, 16, dtype=torch.long)
            batch["attention_mask"][0, :5] = 0
            batch["attention_mask"][2, :9] = 0
        found.append(batch)
    return found
