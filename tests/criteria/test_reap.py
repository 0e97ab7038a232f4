"""Scores of experts against their definition written out, on models of transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph import collect, criteria
from etp_graph.errors import ScoreError

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


def mixtral() -> Any:
    config = transformers.MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def qwen() -> Any:
    config = transformers.Qwen3MoeConfig(
        **SIZES, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=8, head_dim=8, decoder_sparse_step=1
    )
    return transformers.Qwen3MoeForCausalLM(config)


def olmoe() -> Any:
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**SIZES, num_experts=6, num_experts_per_tok=2))


def case(build: Any) -> tuple[Any, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)  # initial weights of std 0.02 add next to nothing
    return model, [{"input_ids": torch.randint(64, (2, 9)), "use_cache": False} for _ in range(3)]


def wanted(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The definition, by a loop over tokens and experts with the weights of the layer: path of the layer -> scores."""
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "gate_up_proj") and hasattr(m, "down_proj")}
    total = {name: torch.zeros(len(m.down_proj), dtype=torch.float64) for name, m in layers.items()}
    count = {name: torch.zeros(len(m.down_proj)) for name, m in layers.items()}

    def look(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            x, index, weights = (*args, *kwargs.values())[:3]
            for token in range(len(x)):
                for slot, expert in enumerate(index[token].tolist()):
                    gate, up = (module.gate_up_proj[expert] @ x[token]).chunk(2)
                    out = module.down_proj[expert] @ (module.act_fn(gate) * up)
                    total[name][expert] += float(weights[token, slot] * out.norm())
                    count[name][expert] += 1

        return hook

    handles = [m.register_forward_pre_hook(look(name), with_kwargs=True) for name, m in layers.items()]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: total[name] / count[name].clamp(min=1) for name in layers}


@pytest.mark.parametrize("build", [mixtral, qwen, olmoe])
def test_reap_is_the_weighted_norm_of_what_an_expert_adds(build: Any) -> None:
    model, batches = case(build)
    plan = etp.trace(model, batches[0], prune="experts", check=False)
    with collect.watch(model, plan, "reap") as record, torch.no_grad():
        for batch in batches:
            model(**batch)
    scores = criteria.reap(model, plan, record=record)
    expected = wanted(model, batches)
    seen = 0
    for group, span in plan.spans():
        if group.locked is None:
            layer = next(a.module for a in group.attributes if a.module in expected)
            torch.testing.assert_close(scores[span].double(), expected[layer], rtol=1e-4, atol=1e-7)
            seen += 1
    assert seen == 2


def test_padding_is_no_data() -> None:
    model, batches = case(mixtral)
    plan = etp.trace(model, batches[0], prune="experts", check=False)
    found = []
    for tokens, mask in ((batches[0]["input_ids"][:1, :5], None), (batches[0]["input_ids"][:1], 5)):
        given = {"input_ids": tokens, "use_cache": False}
        if mask is not None:
            given["attention_mask"] = (torch.arange(9) < mask).long()[None]
        with collect.watch(model, plan, "reap") as record, torch.no_grad():
            model(**given)
        found.append(criteria.reap(model, plan, record=record))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_a_default_device_changes_nothing() -> None:
    model, batches = case(mixtral)
    plan = etp.trace(model, batches[0], prune="experts", check=False)
    found = []
    for device in ("cpu", "meta"):
        with torch.device(device), collect.watch(model, plan, "reap") as record, torch.no_grad():
            model(**batches[0])
        found.append(criteria.reap(model, plan, record=record))
    assert torch.equal(found[0], found[1])


def test_one_call_removes_the_experts_of_least_score() -> None:
    model, batches = case(qwen)
    dense = copy.deepcopy(model)
    done = etp.oneshot_(model, batches, params=0.9, criterion="reap", prune="experts", progress=False)
    expected = wanted(dense, batches)
    for group in done.plan.prunable:
        keep = done.selection.keep[group.name].cpu()
        layer = next(a.module for a in group.attributes if a.module in expected)
        if not bool(keep.all()):
            assert expected[layer][keep].min() > expected[layer][~keep].max()
    assert any(not bool(done.selection.keep[group.name].all()) for group in done.plan.prunable)
    assert model(**batches[0]).logits.isfinite().all()


def test_the_default_names_reap_for_experts() -> None:
    model, batches = case(mixtral)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ScoreError, match=r"mlp.*'reap'"):
        etp.oneshot_(model, batches, params=0.9, prune="experts", progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_without_experts_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ScoreError, match="the plan prunes no experts"):
        etp.oneshot_(model, [torch.randn(3, 4)], params=0.5, criterion="reap", progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_with_other_arguments_are_refused_by_name() -> None:
    model, batches = case(mixtral)
    plan = etp.trace(model, batches[0], prune="experts", check=False)
    for layer in model.model.layers:
        layer.mlp.experts.forward = lambda hidden: hidden
    with pytest.raises(ScoreError, match=r"layers\.0\.mlp.*top_k_index"), collect.watch(model, plan, "reap"):
        pass
