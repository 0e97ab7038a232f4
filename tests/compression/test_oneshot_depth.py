"""Blocks and units under one budget, and groups that are compared by the measured growth of the loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import etp_graph as etp
from etp_graph.collect import Divergence
from etp_graph.depth import shorten_

transformers = pytest.importorskip("transformers")


def llama(idle: tuple[int, ...] = ()) -> nn.Module:
    """A small Llama whose layers of these numbers add next to nothing."""
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )).eval()  # fmt: skip
    for number, layer in enumerate(model.model.layers):
        for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
            last.weight.data *= 1e-4 if number in idle else 5
    found: nn.Module = model
    return found


def texts(count: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(24, (2, 10), generator=generator)} for _ in range(count)]


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_depth_is_the_one_that_is_closest_to_the_dense_model() -> None:
    """Two of four layers do nothing, so that the budget costs nothing if they go."""
    dense, data = llama(idle=(1, 2)), texts()
    model = copy.deepcopy(dense)
    found = etp.oneshot_(model, data, params=0.62, blocks=(0, 1, 2, 3), criterion="magnitude")
    assert sorted(found.removed_blocks) == ["model.layers.1", "model.layers.2"]
    assert found.divergences.keys() == {0, 1, 2, 3}
    assert min(found.divergences, key=lambda n: found.divergences[n]) == 2
    assert found.divergences[2] == pytest.approx(Divergence(dense, data)(model), rel=1e-3, abs=1e-9)
    assert found.dense.params == params(dense)
    assert found.pruned.params == params(model) <= 0.62 * params(dense)
    assert model.config.num_hidden_layers == 2  # type: ignore[union-attr]


def test_one_number_is_what_the_single_functions_do() -> None:
    model, other, data = llama(idle=(2,)), llama(idle=(2,)), texts()
    found = etp.oneshot_(model, data, params=0.7, blocks=1, criterion="magnitude")
    assert found.divergences == {}
    removed = shorten_(other, data, n_blocks=1)
    assert removed.removed == found.removed_blocks
    etp.oneshot_(other, data, params=int(0.7 * params(llama())), criterion="magnitude")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_budget_that_the_blocks_reach_alone_removes_no_unit() -> None:
    model, data = llama(idle=(1,)), texts()
    found = etp.oneshot_(model, data, params=0.95, blocks=1, criterion="magnitude")
    assert bool(found.selection.flat(found.plan).all())


def test_an_error_after_the_blocks_are_gone_brings_them_back() -> None:
    model, data = llama(), texts()
    before, names = copy.deepcopy(model.state_dict()), dict(model.named_modules()).keys()

    def failing(one: nn.Module, plan: etp.Plan) -> Any:
        if one is model:
            raise RuntimeError("the score of the user")
        return etp.criteria.magnitude(one, plan)

    with pytest.raises(RuntimeError, match="the score of the user"):
        etp.oneshot_(model, data, params=0.7, blocks=2, criterion=failing)
    assert dict(model.named_modules()).keys() == names
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.config.num_hidden_layers == 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"blocks": ()}, etp.PlanError, "blocks is empty"),
        ({"blocks": -1}, etp.PlanError, "blocks"),
        ({"blocks": (1, 2.5)}, etp.PlanError, "blocks"),
        ({"blocks": 9}, etp.PlanError, "n_blocks=9"),
        ({"blocks": 1, "params": None, "latency_ms": 1.0}, etp.BudgetError, "is measured on the whole model"),
        ({"blocks": 1, "plan": "own"}, etp.PlanError, "leave out plan="),
        ({"allocation": "guess"}, etp.BudgetError, "allocation"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict[str, Any], error: type[Exception], match: str) -> None:
    model, data = llama(), texts()
    before = copy.deepcopy(model.state_dict())
    given: dict[str, Any] = {"params": 0.7, "criterion": "magnitude", **change}
    if given.get("plan") == "own":
        given["plan"] = etp.trace(model, data[0])
    with pytest.raises(error, match=match):
        etp.oneshot_(model, data, **given)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_allocation_by_sensitivity_spares_the_layers_that_matter() -> None:
    """The neurons of two layers do next to nothing, whatever their norms."""
    data, models = texts(), {}
    for allocation in ("scores", "sensitivity"):
        model = llama()
        for number in (0, 3):
            model.model.layers[number].mlp.down_proj.weight.data *= 1e-3  # type: ignore[union-attr,index]
            model.model.layers[number].mlp.up_proj.weight.data *= 1e3  # type: ignore[union-attr,index]
            model.model.layers[number].mlp.gate_proj.weight.data *= 1e-3  # type: ignore[union-attr,index]
        dense = copy.deepcopy(model)
        found = etp.oneshot_(model, data, params=0.75, criterion="magnitude", allocation=allocation, prune=("neurons",))  # type: ignore[arg-type]
        assert found.pruned.params <= 0.75 * params(dense)
        models[allocation] = Divergence(dense, data)(model)
    assert models["sensitivity"] < models["scores"]
