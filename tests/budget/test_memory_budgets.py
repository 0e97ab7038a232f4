"""Memory: the bytes of the weights and of the cache, as the pruned model holds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import etp_graph as etp
from etp_graph.budget import Budget
from tests.support.models.toy import Toy, toy_plan

DECODER: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
PAIR: dict[str, Any] = {
    "vocab_size": 40, "d_model": 32, "d_kv": 4, "d_ff": 48, "num_layers": 2, "num_heads": 8,
    "decoder_start_token_id": 0,
}  # fmt: skip
IDS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
TOKENS = 5000


def decoder(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "t5":
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**PAIR))
        return model.eval().to(dtype), {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)).eval().to(dtype), {"input_ids": IDS}


def bytes_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[int, int]:
    """What the weights take, and what one token takes in the caches that the model really fills."""
    caches = [value for value in model(**inputs).values() if "Cache" in type(value).__name__]
    layers = [layer for cache in caches for part in (getattr(cache, "self_attention_cache", cache),
              getattr(cache, "cross_attention_cache", None)) if part is not None for layer in part.layers]  # fmt: skip
    held = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    assert held
    return (
        sum(p.numel() * p.element_size() for p in model.parameters()),
        sum(t.shape[1] * t.shape[3] * t.element_size() for t in held),
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", torch.float32), ("llama", torch.bfloat16), ("t5", torch.float32)]
)
def test_the_count_is_what_the_pruned_model_holds(name: str, dtype: torch.dtype) -> None:
    model, inputs = decoder(name, dtype)
    plan = etp.trace(model, inputs, check=False)
    weights, token = bytes_of(model, inputs)
    assert plan.memory_bytes() == weights
    assert plan.memory_bytes(TOKENS) == weights + TOKENS * token
    budget = Budget(memory_mb=0.7 * plan.memory_bytes(TOKENS) / 1e6, kv_tokens=TOKENS)
    etp.prune_(model, plan, etp.allocate(model, plan, etp.criteria.magnitude(model, plan).float(), budget=budget))
    weights, token = bytes_of(model, inputs)
    assert budget.memory_mb is not None
    assert 0.9 * budget.memory_mb <= (weights + TOKENS * token) / 1e6 <= budget.memory_mb
    again = etp.trace(model, inputs, check=False)
    assert again.memory_bytes(TOKENS) == weights + TOKENS * token
    read = etp.Plan.from_json(again.to_json())
    assert (read, read.memory_bytes(9)) == (again, again.memory_bytes(9))


def test_only_weights_count_without_tokens() -> None:
    model, plan = Toy(), toy_plan()
    budget = Budget(memory_mb=0.0022)
    selection = etp.allocate(model, plan, torch.rand(plan.n_units), budget=budget)
    params = etp.cost(model, plan, selection).params
    assert 0.95 * 2200 <= 4 * params <= 2200
    assert plan.memory_bytes() == 4 * 795
    assert Budget.from_json(budget.to_json()) == budget
    assert "memory_mb" not in Budget(params=5).to_json()
    with pytest.raises(etp.BudgetError, match=r"memory_mb=1e-05 is out of reach: the closest is memory_mb=0\.00\d,"):
        etp.allocate(model, plan, torch.rand(plan.n_units), budget=Budget(memory_mb=1e-5))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"memory_mb": 0}, r"memory_mb=0; it must lie in \(0"), ({"memory_mb": "3"}, "memory_mb='3'"),
     ({"params": 5, "kv_tokens": 3}, "belongs to memory_mb"), ({"memory_mb": 5, "kv_tokens": 0.5}, "kv_tokens=0.5"),
     ({"memory_mb": 5, "params": 3}, "one target")],
)  # fmt: skip
def test_wrong_memory_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(etp.BudgetError, match=words):
        Budget(**arguments)


@pytest.mark.filterwarnings("ignore")
def test_tokens_need_a_cache() -> None:
    model, inputs = decoder("llama")
    plan = etp.trace(model, {**inputs, "use_cache": False}, check=False)
    with pytest.raises(etp.BudgetError, match=r"returned no cache.*use_cache=True"):
        plan.memory_bytes(3)
    with pytest.raises(etp.BudgetError, match="returned no cache"):
        etp.allocate(model, plan, torch.rand(plan.n_units), budget=Budget(memory_mb=1, kv_tokens=3))


def test_compress_in_rounds_steers_to_memory_as_to_parameters() -> None:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def train(model: nn.Module, phase: etp.Phase) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        phase.attach(optimizer, steps=4)
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    def widths(**target: Any) -> list[torch.Size]:
        torch.manual_seed(0)
        model = Toy()
        etp.compress(model, x, train=train, evaluate=lambda m: 0.0, rounds=2, **target)
        return [p.shape for p in model.parameters()]

    assert widths(memory_mb=0.0022) == widths(params=550)


def test_a_plan_belongs_to_the_model_in_any_precision() -> None:
    plans = [etp.trace(Toy().to(dtype), torch.randn(1, 3, 8, 8, dtype=dtype), check=False)
             for dtype in (torch.float32, torch.float64)]  # fmt: skip
    assert plans[0].fingerprint == plans[1].fingerprint
    assert 2 * plans[0].memory_bytes() == plans[1].memory_bytes()
