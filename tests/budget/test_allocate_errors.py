"""What :func:`allocate` refuses, and what it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from etp_graph.budget import Budget, allocate
from etp_graph.errors import BudgetError, PlanError, ScoreError
from tests.support.budgets import draw_scores
from tests.support.models.toy import Toy, toy_plan


@pytest.mark.parametrize("name", ["speed_up", "macs", "params"])
@pytest.mark.parametrize("rules", [{}, {"min_units": 5}, {"max_ratio": 0.3}, {"round_to": 8}])
def test_out_of_reach_says_the_closest(name: str, rules: dict[str, Any]) -> None:
    plan, model = toy_plan(), Toy()
    scores = draw_scores(plan, 1)
    with pytest.raises(BudgetError, match="the closest is") as caught:
        allocate(model, plan, scores, budget=Budget(**{name: 10**9 if name == "speed_up" else 1}, **rules))
    closest = float(str(caught.value).split(f"closest is {name}=")[1].split(",")[0])
    found = allocate(model, plan, scores, budget=Budget(**{name: closest}, **rules))
    found.check(plan)
    beyond = closest + (1e-3 if name == "speed_up" else -1)
    with pytest.raises(BudgetError):
        allocate(model, plan, scores, budget=Budget(**{name: beyond}, **rules))


def bad_scores() -> list[tuple[Any, str]]:
    plan = toy_plan()
    cases: list[tuple[Any, str]] = [(torch.ones(3), "shape"), (torch.ones(19, 1), "shape"), ([1.0] * 19, "list")]
    cases.append((torch.ones(plan.n_units, dtype=torch.complex64), "real"))
    for value in (float("nan"), float("inf"), float("-inf")):
        scores = torch.ones(plan.n_units)
        scores[9] = value
        cases.append((scores, "Group 'conv2': 1 of 6 scores are not finite .unit 1: "))
    return cases


@pytest.mark.parametrize(("scores", "message"), bad_scores())
def test_bad_scores_are_refused(scores: Any, message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        allocate(Toy(), toy_plan(), scores, budget=Budget(speed_up=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_scores_of_any_real_dtype(dtype: torch.dtype) -> None:
    plan = toy_plan()
    scores = torch.arange(plan.n_units).to(dtype)
    found = allocate(Toy(), plan, scores, budget=Budget(speed_up=2)).flat(plan)
    assert torch.equal(found, allocate(Toy(), plan, scores.float(), budget=Budget(speed_up=2)).flat(plan))


def test_a_plan_of_another_model_or_without_a_prunable_group_is_refused() -> None:
    plan = toy_plan()
    with pytest.raises(PlanError, match="lacks"):
        allocate(nn.Linear(2, 2), plan, torch.ones(19), budget=Budget(speed_up=2))
    locked = plan.lock(dict.fromkeys(("conv1", "conv2"), "ignored"))
    with pytest.raises(PlanError, match="no prunable group"):
        allocate(Toy(), locked, torch.ones(19), budget=Budget(speed_up=2))
    with pytest.raises(BudgetError, match="no MACs"):
        allocate(Toy(), replace(plan, ops=()), torch.ones(19), budget=Budget(speed_up=2))
