"""The way to a selection: nested steps towards it, each at least as far as was asked, none further than one level."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from etp_graph.budget import Budget, allocate, under_way
from etp_graph.errors import BudgetError, PlanError, ScoreError
from etp_graph.plan import CostModel, Plan
from tests.support.budgets import RANKS, SCOPES, assert_lawful, draw_scores, quantity
from tests.support.models.synthetic import synthetic
from tests.support.models.toy import Toy, toy_plan

SHARES = tuple(i / 16 for i in range(17))


def stations(model: Any, plan: Plan, scores: Tensor, budget: Budget) -> list[Tensor]:
    return [under_way(model, plan, scores, budget=budget, share=share).flat(plan) for share in SHARES]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(1, 1, 3, 2), (1, 2, 4, 3), (2, 3, 6, 2), (3, 3, 4, 4)]),
    target=st.sampled_from([{"speed_up": 1.5}, {"speed_up": 4.0}, {"params": 0.4}]),
    scope=st.sampled_from(SCOPES),
    rank=st.sampled_from(RANKS),
)
def test_the_way_is_a_chain_that_ends_at_the_selection(
    seed: int, shape: tuple[int, int, int, int], target: dict[str, float], scope: Any, rank: Any
) -> None:
    stages, depth, width, coarse = shape
    model, plan = synthetic(seed, stages=stages, depth=depth, width=width, coarse=coarse)
    scores, costs = draw_scores(plan, seed), CostModel(plan)
    if "params" in target:
        target = {"params": int(target["params"] * costs.dense.params)}
    budget = Budget(**target, scope=scope, rank=rank)  # type: ignore[arg-type]
    try:
        end = allocate(model, plan, scores, budget=budget).flat(plan)
    except BudgetError:
        with pytest.raises(BudgetError, match="out of reach"):
            under_way(model, plan, scores, budget=budget, share=0.5)
        return
    found = stations(model, plan, scores, budget)
    assert bool(found[0].all())
    assert torch.equal(found[-1], end)
    dense, goal = quantity(costs.dense, budget), min(budget.target(costs.dense), quantity(costs.dense, budget))
    for share, before, after in zip(SHARES[1:], found, found[1:], strict=False):
        assert not (after & ~before).any(), "a unit came back"
        assert_lawful(plan, after, scores, budget)
        assert quantity(costs.evaluate(after), budget) <= dense - share * (dense - goal) + 1


def test_coarse_units_do_not_make_others_come_and_go() -> None:
    """Fitting every cost on the way closely, as :func:`allocate` does, would: with few dear units it exchanges them."""
    model, plan = synthetic(3, stages=1, depth=2, width=4, coarse=3)
    scores, costs = draw_scores(plan, 3), CostModel(plan)
    budget = Budget(speed_up=4.0)
    goals = [int(costs.dense.macs * (1 - share * 0.75)) for share in SHARES]
    fitted = [allocate(model, plan, scores, budget=budget.with_count(goal)).flat(plan) for goal in goals]
    assert any(bool((after & ~before).any()) for before, after in pairwise(fitted))
    found = stations(model, plan, scores, budget)
    assert not any(bool((after & ~before).any()) for before, after in pairwise(found))


def test_no_step_goes_further_than_a_level_beyond_what_was_asked() -> None:
    model, plan = Toy(), toy_plan()
    scores, costs, budget = draw_scores(plan, 0), CostModel(plan), Budget(speed_up=4.0)
    dense, target = costs.dense.macs, budget.target(costs.dense)
    end = allocate(model, plan, scores, budget=budget).flat(plan)
    for share in SHARES[1:-1]:
        keep = under_way(model, plan, scores, budget=budget, share=share).flat(plan)
        gone = (~keep).nonzero().flatten().tolist()
        last = max(gone, key=lambda unit: float(scores[unit]))
        keep[last] = True
        assert costs.evaluate(keep).macs > dense - int(share * (dense - target))
        assert not (~keep & end).any()


@pytest.mark.parametrize(
    "budget",
    [Budget(macs=10**9), Budget(params=10**9, min_units=1_000), Budget(speed_up=1.0, max_ratio=0.0)],
)
def test_a_model_that_fits_keeps_everything(budget: Budget) -> None:
    model, plan = Toy(), toy_plan()
    for share in (0.0, 0.5, 1.0):
        kept = under_way(model, plan, draw_scores(plan, 0), budget=budget, share=share).flat(plan)
        assert bool(kept.all())


def test_bad_input_is_refused() -> None:
    model, plan = Toy(), toy_plan()
    with pytest.raises(ScoreError, match="finite"):
        under_way(model, plan, torch.full((plan.n_units,), float("nan")), budget=Budget(speed_up=2.0), share=0.5)
    with pytest.raises(BudgetError, match="measured"):
        under_way(model, plan, draw_scores(plan, 0), budget=Budget(latency_ms=1.0), share=0.5)
    locked = plan.lock({group.name: "a test" for group in plan.groups})
    with pytest.raises(PlanError, match="no prunable group"):
        under_way(model, locked, draw_scores(plan, 0), budget=Budget(speed_up=2.0), share=0.5)
    with pytest.raises(PlanError):
        under_way(torch.nn.Linear(2, 2), plan, draw_scores(plan, 0), budget=Budget(speed_up=2.0), share=0.5)
