"""Every family of transformers loads what was exported, with equal outputs, or says why its class cannot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import etp_graph as etp
from benchmarks.models import huggingface as registry
from etp_graph.model import run_model
from etp_graph.plan import Group

KINDS = ("neurons", "heads", "stream", "depth")

_CAUSAL = registry.DECODERS["llama_gqa"][1]
_MORE: dict[str, registry.Row] = {
    "olmo2_wide": ("Olmo2ForCausalLM", {**_CAUSAL, "num_key_value_heads": 4}, registry.DECODERS["llama"][2]),
    "granite": ("GraniteForCausalLM", {**_CAUSAL, "embedding_multiplier": 3.0}, registry.DECODERS["llama"][2]),
    "smollm3": ("SmolLM3ForCausalLM", {**_CAUSAL, "no_rope_layers": [1, 0]}, registry.DECODERS["llama"][2]),
}
ROWS: dict[str, registry.Row] = {
    **registry.ENCODERS, **registry.DECODERS, **registry.SEQUENCES, **registry.IMAGES, **_MORE
}  # fmt: skip

EQUAL = "equal"

# What each class can say about neurons, heads, the stream and depth: equal outputs, or a part of the reason why not.
TABLE: dict[str, tuple[str, str, str, str]] = {
    "llama_gqa": (EQUAL, EQUAL, EQUAL, EQUAL),
    "gpt2": (EQUAL, "one n_embd", "one n_embd", EQUAL),
    "bert": (EQUAL, "one hidden_size", "one hidden_size", EQUAL),
    "t5": (EQUAL, EQUAL, "model_dim", EQUAL),
}
SLOW: dict[str, tuple[str, str, str, str]] = {
    "qwen2": (EQUAL, EQUAL, EQUAL, EQUAL),
    "qwen3": (EQUAL, EQUAL, EQUAL, EQUAL),
    "mistral": (EQUAL, EQUAL, EQUAL, EQUAL),
    "gemma2": (EQUAL, EQUAL, "embed_scale", EQUAL),
    "gemma3": (EQUAL, EQUAL, "embed_scale", EQUAL),
    "phi3": (EQUAL, EQUAL, EQUAL, EQUAL),
    "gpt_neox": (EQUAL, "one hidden_size", "one hidden_size", EQUAL),
    "opt": (EQUAL, "one hidden_size", "one hidden_size", EQUAL),
    "olmo2_wide": (EQUAL, EQUAL, EQUAL, EQUAL),
    "granite": (EQUAL, EQUAL, EQUAL, EQUAL),
    "smollm3": (EQUAL, EQUAL, EQUAL, EQUAL),
    "mixtral": (EQUAL, EQUAL, EQUAL, EQUAL),
    "bart": (EQUAL, "one d_model", "one d_model", EQUAL),
    "whisper": (EQUAL, "one d_model", "one d_model", EQUAL),
    "roberta": (EQUAL, "one hidden_size", "one hidden_size", EQUAL),
    "distilbert": (EQUAL, "one dim", "one dim", EQUAL),
    "modernbert": (EQUAL, "one hidden_size", "one hidden_size", EQUAL),
    "vit": (EQUAL, EQUAL, EQUAL, EQUAL),
    "clip": (EQUAL, "one text_config.hidden_size", "one text_config.hidden_size", EQUAL),
    "t5_gated": (EQUAL, EQUAL, EQUAL, EQUAL),
}


def build(name: str) -> tuple[nn.Module, Any]:
    cls, config, inputs = ROWS[name]
    torch.manual_seed(0)
    return registry.from_config(cls, config)().eval(), inputs()


def halve(group: Group) -> torch.Tensor:
    """At most half of the units stay, drawn at random, equally many in each block."""
    width, step = group.n_units // group.blocks, math.lcm(group.multiple, group.blocks)
    kept = max(group.n_units // 2 // step * step, step) // group.blocks
    generator = torch.Generator().manual_seed(group.n_units)
    rows = torch.stack([torch.randperm(width, generator=generator) < kept for _ in range(group.blocks)])
    return rows.flatten()


def outcome(name: str, kind: str, folder: Path) -> str:
    """Prune half of the units of a kind where the class can say so; return ``equal`` or the reason."""
    model, inputs = build(name)
    if kind == "depth":
        shorten(model, inputs)
        return exported(name, model, inputs, folder)
    try:
        plan = etp.trace(model, inputs, prune=[kind])
    except etp.PlanError as error:
        return str(error)
    free = etp.export.restrict_plan(model, plan)
    if not free.prunable:
        return "; ".join(sorted({group.locked or "" for group in free.groups if group.kind == kind}))
    etp.prune_(model, free, etp.Selection({group.name: halve(group) for group in free.prunable}))
    return exported(name, model, inputs, folder)


def shorten(model: nn.Module, inputs: Any) -> None:
    """Remove the last block of each container that can go."""
    last = {block.container: block for block in etp.depth.find_blocks(model, inputs)}
    assert etp.depth.remove_blocks_(model, last.values(), inputs) < 1e-5


def exported(name: str, model: nn.Module, inputs: Any, folder: Path) -> str:
    """Export a pruned model and load it with its class; return ``equal`` or the reason why not."""
    try:
        etp.export.huggingface(model, folder)
    except etp.ExportError as error:
        return str(error)
    again = getattr(transformers, ROWS[name][0]).from_pretrained(folder).eval()
    with torch.no_grad():
        ours, stock = run_model(model, inputs), run_model(again, inputs)
    for ours_one, stock_one in zip(tensors(ours), tensors(stock), strict=True):
        torch.testing.assert_close(stock_one, ours_one)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in build(name)[0].parameters())
    return EQUAL


def tensors(outputs: Any) -> list[torch.Tensor]:
    return [value for value in outputs.to_tuple() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TABLE)
def test_a_class_loads_what_was_exported_or_the_reason_is_told(name: str, kind: str, tmp_path: Path) -> None:
    assert TABLE[name][KINDS.index(kind)] in outcome(name, kind, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SLOW)
def test_every_family_loads_what_was_exported_or_the_reason_is_told(name: str, kind: str, tmp_path: Path) -> None:
    assert SLOW[name][KINDS.index(kind)] in outcome(name, kind, tmp_path / "out")
