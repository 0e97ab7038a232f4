"""Groups of one kind and one size keep equally many units, each the best of its own."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from etp_graph.budget import Budget, allocate
from etp_graph.criteria import magnitude
from etp_graph.errors import BudgetError
from etp_graph.graph import trace
from etp_graph.plan import Plan, Selection, cost
from tests.support.budgets import SCOPES, draw_scores


def llama() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, head_dim=4,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval(), {"input_ids": torch.arange(5)[None], "use_cache": False}


@pytest.fixture(scope="module")
def traced() -> tuple[nn.Module, Plan]:
    model, inputs = llama()
    return model, trace(model, inputs, prune=["heads", "neurons", "stream"])


def widths(plan: Plan, selection: Selection) -> dict[tuple[str, int], set[int]]:
    found: dict[tuple[str, int], set[int]] = defaultdict(set)
    keep = selection.flat(plan)
    for group, span in plan.spans():
        if group.locked is None:
            found[group.kind, group.n_units].add(int(keep[span].sum()))
    return found


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("round_to", [1, 3])
def test_every_kind_has_one_width(traced: tuple[nn.Module, Plan], scope: Any, round_to: int) -> None:
    model, plan = traced
    target = int(0.6 * plan.dense.params)
    budget = Budget(params=target, uniform=True, scope=scope, round_to={"neurons": round_to, "stream": round_to})
    scores = draw_scores(plan, 0)
    selection = allocate(model, plan, scores, budget=budget)
    selection.check(plan)
    assert all(len(found) == 1 for found in widths(plan, selection).values())
    assert 0.9 * target < cost(model, plan, selection).params <= target
    for group, span in plan.spans():  # each group keeps the best of its own
        keep = selection.keep[group.name]
        if not bool(keep.all()):
            assert scores[span][keep].min() >= scores[span][~keep].max()
            assert group.kind == "heads" or int(keep.sum()) % round_to == 0


def test_no_heads_go_where_the_neurons_alone_come_close(traced: tuple[nn.Module, Plan]) -> None:
    model, plan = traced
    scores = torch.ones(plan.n_units)
    for group, span in plan.spans():
        scores[span] += 100.0 * (group.kind != "neurons")
    one_step = 4 * 3 * 3 * 24  # four neurons of three layers, each with three rows or columns
    target = plan.dense.params - one_step - one_step // 2
    budget = Budget(params=target, uniform=True, round_to={"neurons": 4})
    selection = allocate(model, plan, scores, budget=budget)
    assert widths(plan, selection) == {("heads", 3): {3}, ("stream", 24): {24}, ("neurons", 40): {32}}


def test_only_the_named_kinds_are_uniform(traced: tuple[nn.Module, Plan]) -> None:
    model, plan = traced
    scores = draw_scores(plan, 0)
    for group, span in plan.spans():
        scores[span] *= 1 + 9 * group.name.startswith("model.layers.0")
    found = widths(plan, allocate(model, plan, scores, budget=Budget(params=int(0.8 * plan.dense.params))))
    assert len(found["neurons", 40]) > 1
    budget = Budget(params=int(0.8 * plan.dense.params), uniform="neurons")
    found = widths(plan, allocate(model, plan, scores, budget=budget))
    assert len(found["neurons", 40]) == 1
    assert len(found["heads", 3]) > 1


def test_one_locked_layer_holds_the_others_of_its_kind() -> None:
    model, inputs = llama()
    plan = trace(model, inputs, ignore=["model.layers.1.mlp"])
    scores = magnitude(model, plan)
    selection = allocate(model, plan, scores, budget=Budget(params=int(0.9 * plan.dense.params), uniform=True))
    assert widths(plan, selection)["neurons", 40] == {40}
    with pytest.raises(BudgetError, match="uniform"):
        allocate(model, plan, scores, budget=Budget(params=int(0.5 * plan.dense.params), uniform=True))


def test_groups_of_other_sizes_are_free() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU())
    model.append(nn.Linear(12, 3))
    plan = trace(model, torch.randn(2, 6))
    budget = Budget(params=plan.dense.params // 2, uniform=True)
    found = widths(plan, allocate(model, plan, draw_scores(plan, 1), budget=budget))
    assert {size: len(kept) for (_, size), kept in found.items()} == {8: 1, 12: 1}


@pytest.mark.parametrize("value", ["head", (), ["neurons", "rows"], 3])
def test_an_unknown_kind_is_refused(value: Any) -> None:
    with pytest.raises(BudgetError, match="uniform"):
        Budget(params=10, uniform=value)


def test_a_budget_reads_back_what_it_wrote() -> None:
    budget = Budget(params=10, uniform=["heads", "neurons"])
    assert budget.uniform == ("heads", "neurons")
    assert Budget.from_json(budget.to_json()) == budget
