"""Pruned decoders generate, with and without a cache, and survive saving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import etp_graph as etp
from benchmarks.models import registry
from etp_graph.verification._sampling import random_selection

NAMES = ("hf:gpt2", "hf:llama_gqa", "hf:mixtral", "hf:falcon_multi_query", "hf:phi3", "hf:t5", "hf:bart", "hf:gemma")


@pytest.mark.parametrize("name", NAMES)
def test_generate(name: str, tmp_path: Path) -> None:
    entry = registry()[name]
    torch.manual_seed(0)
    model, inputs = entry.build(), entry.inputs()
    plan = etp.trace(model, inputs)
    etp.prune_(model, plan, random_selection(plan, plan.prunable, 0.4, torch.Generator().manual_seed(0)))
    ids = inputs["input_ids"]

    def tokens(network: torch.nn.Module, *, cache: bool) -> torch.Tensor:
        return network.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cache, pad_token_id=0)

    assert torch.equal(tokens(model, cache=True), tokens(model, cache=False))
    etp.save(model, tmp_path / "pruned")
    loaded = etp.load(tmp_path / "pruned", build=entry.build).eval()
    assert torch.equal(tokens(loaded, cache=True), tokens(model, cache=True))
