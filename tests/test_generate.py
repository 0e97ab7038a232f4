"""Pruned decoders generate what the masked ones generate, with and without a cache, and survive saving."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import etp_graph as etp
from benchmarks.models import registry
from etp_graph.standins import standing_in
from etp_graph.verification import Masked, random_selection

NAMES = ("hf:gpt2", "hf:llama_gqa", "hf:mixtral", "hf:falcon_multi_query", "hf:phi3", "hf:t5", "hf:bart", "hf:gemma")
STATIC: dict[str, Any] = {"cache_implementation": "static"}
CACHES: tuple[dict[str, Any], ...] = ({"use_cache": True}, {"use_cache": False}, STATIC)
CHUNKED: dict[str, Any] = {**STATIC, "prefill_chunk_size": 4}
"""In chunks, transformers allocates the cache before the first keys are there."""
IN_CHUNKS = ("hf:gpt2", "hf:llama_gqa", "hf:gemma")
"""Where the dense model can do it; that of Falcon cannot with one head of keys."""


@pytest.mark.parametrize("name", NAMES)
def test_generate(name: str, tmp_path: Path) -> None:
    entry = registry()[name]
    torch.manual_seed(0)
    model, inputs = entry.build(), entry.inputs()
    inputs.pop("use_cache")
    plan = etp.trace(model, inputs)
    assert any(group.kind == "heads" for group in plan.prunable)
    selection = random_selection(plan, plan.prunable, 0.4, torch.Generator().manual_seed(0))
    masked = copy.deepcopy(model)
    etp.prune_(model, plan, selection)

    def generated(network: torch.nn.Module, cache: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        found = network.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False, pad_token_id=0,
                                 return_dict_in_generate=True, output_logits=True, **cache)  # fmt: skip
        return found.sequences, torch.stack(found.logits)

    for cache in (*CACHES, CHUNKED) if name in IN_CHUNKS else CACHES:
        with Masked(masked, plan, selection.flat(plan)), standing_in(masked, views_only=True):
            want = generated(masked, cache)
        for got, expected in zip(generated(model, cache), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    etp.save(model, tmp_path / "pruned")
    loaded = etp.load(tmp_path / "pruned", build=entry.build).eval()
    for cache in CACHES:
        assert torch.equal(generated(loaded, cache)[0], generated(model, cache)[0])


def test_rotated_dimensions_of_heads_are_saved_with_their_table(tmp_path: Path) -> None:
    entry = registry()["hf:llama_gqa"]
    model, inputs = entry.build(), entry.inputs()
    inputs.pop("use_cache")
    plan = etp.trace(model, inputs, prune=["head_dims"])
    etp.prune_(model, plan, random_selection(plan, plan.prunable, 0.4, torch.Generator().manual_seed(0)))
    etp.save(model, tmp_path / "pruned")
    with torch.no_grad():
        expected = model(**inputs).logits
        for again in (etp.load(tmp_path / "pruned"), etp.load(tmp_path / "pruned", build=entry.build)):
            assert torch.equal(again(**inputs).logits, expected)
    tokens = [
        model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*tokens)
