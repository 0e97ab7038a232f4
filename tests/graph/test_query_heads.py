"""Query heads of grouped-query attention: a unit is query head j of every head of keys and values."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.standins import standing_in
from etp_graph.verification import Masked, random_selection

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 39,
}  # fmt: skip
PHI3 = {**BASE, "hidden_size": 48}
CLASSES: dict[str, dict[str, Any]] = {
    "Llama": BASE, "Qwen2": {**BASE, "hidden_size": 48}, "Qwen3": BASE, "Mistral": BASE, "Gemma": BASE, "Gemma2": BASE,
    "Phi3": PHI3, "Olmo2": PHI3, "Granite": PHI3, "Starcoder2": PHI3, "SmolLM3": PHI3,
}  # fmt: skip
IDS = torch.tensor([[5, 9, 3, 7, 2, 30], [8, 8, 21, 4, 6, 11]])
PADDED = {"input_ids": IDS, "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])}


def causal(name: str, **others: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**CLASSES[name] | others)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def queries(plan: etp.Plan) -> list[etp.plan.Group]:
    return [group for group in plan.prunable if group.kind == "query_heads"]


def without(plan: etp.Plan, removed: dict[str, list[int]]) -> etp.Selection:
    """Select all but these units of each kind."""
    keep = torch.ones(plan.n_units, dtype=torch.bool)
    for group, span in plan.spans():
        if group.locked is None:
            for unit in removed.get(group.kind, []):
                keep[span.start + unit] = False
    return etp.Selection.from_flat(plan, keep)


FAST = ("Llama", "Qwen2", "Qwen3", "Gemma", "Phi3")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CLASSES]
)
def test_pruned_equals_masked_and_the_exported_folder(name: str, tmp_path: Path) -> None:
    model = causal(name)
    plan = etp.trace(model, IDS, prune=["query_heads"])
    assert [group.n_units for group in queries(plan)] == [3, 3]
    etp.verify(model, plan, IDS)
    selection = without(plan, {"query_heads": [1]})
    masked, expected = copy.deepcopy(model), etp.cost(model, plan, selection)
    etp.prune_(model, plan, selection)
    assert sum(p.numel() for p in model.parameters()) == expected.params
    attention = model.model.layers[0].self_attn
    assert attention.num_key_value_groups == 2
    assert attention.o_proj.weight.shape == (CLASSES[name]["hidden_size"], 2 * 2 * 8)
    implementation = model.config._attn_implementation
    with torch.no_grad():
        for inputs in ({"input_ids": IDS}, PADDED):  # with a mask, other code repeats the heads of keys
            with Masked(masked, plan, selection.flat(plan)), standing_in(masked, views_only=True):
                want = masked(**inputs).logits
            torch.testing.assert_close(model(**inputs).logits, want, rtol=1e-4, atol=1e-4)
        model.set_attn_implementation("eager")
        got = model(**PADDED).logits
        torch.testing.assert_close(got[:, 2:], want[:, 2:], rtol=1e-4, atol=1e-4)  # what padding sees is left open
        model.set_attn_implementation(implementation)
        tokens = [model.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)]
        assert torch.equal(*tokens)
    etp.export.huggingface(model, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (loaded.config.num_attention_heads, loaded.config.num_key_value_heads) == (4, 2)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**PADDED).logits, model(**PADDED).logits)
    assert torch.equal(loaded.generate(IDS, max_new_tokens=5, do_sample=False), tokens[0])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_all_kinds_of_a_head_go_together(implementation: str) -> None:
    model = causal("Llama", num_attention_heads=12, num_key_value_heads=3, attn_implementation=implementation)
    plan = etp.trace(model, PADDED, prune=["heads", "query_heads", "head_dims"])
    assert {group.kind for group in plan.prunable} == {"heads", "query_heads", "head_dims"}
    etp.verify(model, plan, PADDED)
    selection = without(plan, {"heads": [0], "query_heads": [1, 3], "head_dims": [2]})
    expected = etp.cost(model, plan, selection)
    etp.prune_(model, plan, selection)
    attention = model.model.layers[1].self_attn
    assert attention.q_proj.weight.shape == (2 * 2 * 6, 24)
    assert attention.k_proj.weight.shape == (2 * 6, 24)
    assert sum(p.numel() for p in model.parameters()) == expected.params
    assert etp.cost(model, etp.trace(model, PADDED)).macs == expected.macs


def test_they_are_on_request_only_and_the_default_plan_stays() -> None:
    model = causal("Llama")
    plan = etp.trace(model, IDS)
    assert {group.kind for group in plan.prunable} == {"heads", "neurons"}
    (reason,) = {group.locked for group in plan.groups if group.kind == "query_heads"}
    assert reason is not None
    assert "prune=[..., 'query_heads']" in reason


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma"])
def test_with_one_head_of_keys_every_query_head_is_a_head(name: str) -> None:
    model = causal(name, num_key_value_heads=1)
    for inputs in (IDS, PADDED):
        plan = etp.trace(model, inputs)
        assert [group.n_units for group in plan.prunable if group.kind == "heads"] == [6, 6]
        assert not [group for group in plan.groups if group.kind == "query_heads"]
    masked, selection = copy.deepcopy(model), random_selection(plan, plan.prunable, 0.5, torch.Generator())
    etp.prune_(model, plan, selection)
    with torch.no_grad(), Masked(masked, plan, selection.flat(plan)), standing_in(masked, views_only=True):
        for inputs in ({"input_ids": IDS}, PADDED):
            torch.testing.assert_close(model(**inputs).logits, masked(**inputs).logits, rtol=1e-4, atol=1e-4)
    tokens = [model.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*tokens)


def test_a_uniform_budget_keeps_equally_many_and_can_be_exported(tmp_path: Path) -> None:
    model = causal("Llama", num_attention_heads=12, num_key_value_heads=2)
    plan = etp.trace(model, IDS, prune=["query_heads", "neurons"])
    scores = etp.criteria.magnitude(model, plan)
    selection = etp.allocate(model, plan, scores, budget=etp.Budget(params=0.8, uniform=True))
    etp.prune_(model, plan, selection)
    etp.export.huggingface(model, tmp_path / "out")


class Attention(nn.Module):
    """Attention that repeats heads of keys in one of the ways of users."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.n_heads, self.n_kv_heads, self.head_dim, self.n_rep = 6, 2, 4, 3
        self.wq, self.wk, self.wv = nn.Linear(16, 24), nn.Linear(16, 8), nn.Linear(16, 8)
        self.wo = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.wq(x).view(b, t, self.n_heads, self.head_dim).transpose(1, 2)
        k, v = (w(x).view(b, t, self.n_kv_heads, self.head_dim).transpose(1, 2) for w in (self.wk, self.wv))
        if self.how.startswith("groups"):
            return x + self.wo(self.attend_in_groups(q, k, v).transpose(1, 2).reshape(b, t, -1))
        if self.how == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = self.repeat(k), self.repeat(v)
            out = (q @ k.transpose(2, 3) / 4).softmax(-1) @ v
        return x + self.wo(out.transpose(1, 2).reshape(b, t, -1))

    def attend_in_groups(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, _, t, d = q.shape
        q = q.reshape(b, self.n_kv_heads, self.n_rep, t, d)
        if self.how == "groups by einsum":
            weights = torch.einsum("bkrtd,bksd->bkrts", q, k).div(4).softmax(-1)
            return torch.einsum("bkrts,bksd->bkrtd", weights, v).flatten(1, 2)
        return ((q @ k[:, :, None].mT / 4).softmax(-1) @ v[:, :, None]).flatten(1, 2)

    def repeat(self, x: Tensor) -> Tensor:
        b, h, t, d = x.shape
        match self.how:
            case "interleave":
                return x.repeat_interleave(self.n_rep, dim=1)
            case "function":
                return torch.repeat_interleave(x, dim=1, repeats=self.n_rep)
            case "quotient":
                times = self.n_heads // self.n_kv_heads
                return x[:, :, None].expand(b, h, times, t, d).reshape(b, h * times, t, d)
            case "tile":
                return x.repeat(1, self.n_rep, 1, 1)
            case "tiled expand":
                return x[:, None].expand(b, self.n_rep, h, t, d).flatten(1, 2)
            case "broadcast_to":
                return torch.broadcast_to(x[:, :, None], (b, h, self.n_rep, t, d)).flatten(1, 2)
            case "method":
                return x.unsqueeze(2).expand(-1, -1, self.n_rep, -1, -1).flatten(1, 2)
        return x[:, :, None].expand(b, self.n_kv_heads, self.n_rep, t, d).reshape(b, -1, t, d)


WAYS = ("sdpa", "interleave", "function", "quotient", "method", "meta", "tile", "tiled expand", "broadcast_to",
        "groups by einsum", "groups by broadcasting")  # fmt: skip


@pytest.mark.parametrize("how", WAYS)
def test_code_of_users(how: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 16), Attention(how), Attention(how), nn.Linear(16, 3)), torch.randn(2, 7, 5)
    plan = etp.trace(model, x, prune=["query_heads", "heads"])
    assert [group.n_units for group in queries(plan)] == [3, 3]
    assert sum(group.kind == "heads" for group in plan.prunable) == 2
    etp.verify(model, plan, x)
    etp.prune_(model, plan, without(plan, {"query_heads": [0, 2]}))
    assert model[1].wq.weight.shape == (2 * 4, 16)
    assert model(x).shape == (2, 7, 3)


def test_heads_that_the_code_does_not_repeat_are_no_query_heads() -> None:
    model = causal("Llama", num_key_value_heads=6)
    assert not [group for group in etp.trace(model, IDS).groups if group.kind == "query_heads"]
