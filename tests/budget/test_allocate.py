"""Selections from scores and budgets: admissible, within the budget, close to it, and in the order of the scores."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.budget import Budget, allocate
from etp_graph.budget._levels import Levels
from etp_graph.errors import BudgetError
from etp_graph.plan import CostModel, Group, Op, Plan
from tests.support.budgets import RANKS, SCOPES, admissible, assert_lawful, draw_scores, quantity
from tests.support.models.synthetic import Builder, synthetic
from tests.support.models.toy import Toy, toy_plan

SPEED_UPS = (1.02, 1.1, 1.3, 1.6, 2, 2.5, 3, 4, 6, 9)


def counts(plan: Plan, keep: Tensor) -> list[int]:
    return [int(keep[span].sum()) for _, span in plan.spans()]


def with_count(group: Group, scores: Tensor, kept: int) -> Tensor:
    """The ``kept`` best units of a group, the same number in each block."""
    rows = scores.view(group.blocks, -1)
    best = rows.argsort(dim=1, descending=True, stable=True)[:, : kept // group.blocks]
    return torch.zeros_like(rows, dtype=torch.bool).scatter(1, best, True).view(-1)


def neighbours(plan: Plan, keep: Tensor, scores: Tensor, budget: Budget, *, exchanges: bool) -> list[Tensor]:
    """All selections with one more level, first; then those with one more in a group and one less in another."""
    up: dict[int, Tensor] = {}
    down: dict[int, Tensor] = {}
    for i, (group, span) in enumerate(plan.spans()):
        now = int(keep[span].sum())
        more = [n for n in range(now + 1, group.n_units + 1) if admissible(group, budget, n)]
        less = [n for n in range(now) if admissible(group, budget, n)]
        for found, allowed in ((up, more[:1]), (down, less[-1:])):
            for n in allowed:
                found[i] = with_count(group, scores[span], n)
    spans = [span for _, span in plan.spans()]
    moves: list[dict[int, Tensor]] = [{i: part} for i, part in up.items()]
    if exchanges:
        moves += [{a: up[a], b: down[b]} for a, b in itertools.product(up, down) if a != b]
    result = []
    for move in moves:
        other = keep.clone()
        for i, part in move.items():
            other[spans[i]] = part
        result.append(other)
    return result


def assert_met(plan: Plan, keep: Tensor, scores: Tensor, budget: Budget) -> None:
    """Never above the target, nothing more fits, and within 1 % of it or no exchange of two levels comes closer."""
    costs = CostModel(plan)
    target, found = budget.target(costs.dense), quantity(costs.evaluate(keep), budget)
    assert found <= target
    far = found < 0.99 * target
    around = neighbours(plan, keep, scores, budget, exchanges=far)
    assert not [
        value for value in (quantity(costs.evaluate(other), budget) for other in around) if found < value <= target
    ]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("seed", range(3))
def test_ten_budgets_are_met(scope: Any, rank: Any, seed: int) -> None:
    model, plan = synthetic(seed, coarse=seed + 1)
    scores = draw_scores(plan, seed)
    for speed_up in SPEED_UPS:
        budget = Budget(speed_up=speed_up, scope=scope, rank=rank)
        selection = allocate(model, plan, scores, budget=budget)
        selection.check(plan)
        keep = selection.flat(plan)
        assert_lawful(plan, keep, scores, budget)
        assert_met(plan, keep, scores, budget)
        dense, found = CostModel(plan).dense.macs, CostModel(plan).evaluate(keep).macs
        assert 0.99 * dense / speed_up <= found <= dense / speed_up


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(1, 1, 3, 2), (1, 2, 4, 3), (2, 3, 6, 2), (3, 3, 4, 4)]),
    share=st.floats(0.02, 0.99),
    name=st.sampled_from(["speed_up", "macs", "params"]),
    rules=st.fixed_dictionaries(
        {},
        optional={
            "min_units": st.integers(1, 9), "max_ratio": st.floats(0.1, 1.0), "round_to": st.sampled_from([2, 3, 16]),
            "scope": st.sampled_from(SCOPES), "rank": st.sampled_from(RANKS),
        },
    ),
)  # fmt: skip
def test_any_budget(
    seed: int, shape: tuple[int, int, int, int], share: float, name: str, rules: dict[str, Any]
) -> None:
    stages, depth, width, coarse = shape
    model, plan = synthetic(seed, stages=stages, depth=depth, width=width, coarse=coarse)
    scores = draw_scores(plan, seed)
    dense = CostModel(plan).dense
    value = 1 / share if name == "speed_up" else int(share * getattr(dense, name))
    budget = Budget(**{name: value}, **rules)
    try:
        selection = allocate(model, plan, scores, budget=budget)
    except BudgetError:
        least = [
            with_count(g, scores[span], min(n for n in range(g.n_units + 1) if admissible(g, budget, n)))
            for g, span in plan.spans()
        ]
        assert quantity(CostModel(plan).evaluate(torch.cat(least)), budget) > budget.target(dense)
        return
    selection.check(plan)
    keep = selection.flat(plan)
    assert_lawful(plan, keep, scores, budget)
    assert_met(plan, keep, scores, budget)


@pytest.mark.parametrize("name", ["speed_up", "macs", "params"])
def test_small_plans_reach_the_nearest_of_all_selections(name: str) -> None:
    plan, model = toy_plan(), Toy()
    scores = draw_scores(plan, 0)
    costs = CostModel(plan)
    every = []
    for a, b in itertools.product(range(1, 9), range(1, 7)):
        parts = [with_count(g, scores[s], n) for (g, s), n in zip(plan.spans(), (a, b, 5), strict=True)]
        every.append(costs.evaluate(torch.cat(parts)))
    for share in np.linspace(0.1, 1, 25):
        value = 1 / share if name == "speed_up" else int(share * getattr(costs.dense, name))
        budget = Budget(**{name: value})
        target = budget.target(costs.dense)
        nearest = max(quantity(c, budget) for c in every if quantity(c, budget) <= target)
        found = quantity(costs.evaluate(allocate(model, plan, scores, budget=budget).flat(plan)), budget)
        assert min(nearest, 0.99 * target) <= found <= target


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("decimals", [0, 1, 7])
def test_permuting_the_groups_changes_nothing(scope: Any, round_to: int, decimals: int) -> None:
    """Nor do ties: groups of equal sizes and scores rounded to few decimals."""
    model, plan = synthetic(3, width=4, depth=5, coarse=2)
    scores = draw_scores(plan, 3).round(decimals=decimals)
    spans = dict(zip((g.name for g in plan.groups), (span for _, span in plan.spans()), strict=True))
    other = replace(plan, groups=tuple(sorted(plan.groups, key=lambda g: g.name[::-1])))
    moved = torch.cat([scores[spans[g.name]] for g in other.groups])
    for speed_up in (1.2, 2.2):
        budget = Budget(speed_up=speed_up, scope=scope, round_to=round_to)
        first, second = (allocate(model, p, s, budget=budget) for p, s in ((plan, scores), (other, moved)))
        assert all(torch.equal(first.keep[name], second.keep[name]) for name in spans)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_the_scale_of_the_scores_does_not_matter(scope: Any, scale: float) -> None:
    model, plan = synthetic(4)
    scores, budget = draw_scores(plan, 4).double(), Budget(speed_up=2, scope=scope)
    assert torch.equal(
        allocate(model, plan, scores, budget=budget).flat(plan),
        allocate(model, plan, scores * scale, budget=budget).flat(plan),
    )


def test_local_scope_removes_the_same_share_everywhere() -> None:
    model, plan = synthetic(5, width=64)
    scores = draw_scores(plan, 5)
    keep = allocate(model, plan, scores, budget=Budget(speed_up=3, scope="local")).flat(plan)
    shares = [float(keep[span].float().mean()) for group, span in plan.spans() if group.n_units >= 64]
    assert max(shares) - min(shares) < 0.1
    free = allocate(model, plan, scores, budget=Budget(speed_up=3)).flat(plan)
    spread = [float(free[span].float().mean()) for group, span in plan.spans() if group.n_units >= 64]
    assert max(spread) - min(spread) > 0.3


@pytest.mark.parametrize("speed_up", [1.3, 2.0, 3.7])
def test_local_scope_leaves_groups_of_one_size_equally_wide(speed_up: float) -> None:
    """Layers of a transformer then keep the same widths, up to the units with which the target is met."""
    layers = [layer for _ in range(5) for layer in (nn.Linear(24, 24), nn.ReLU())]
    model = nn.Sequential(nn.Linear(8, 24), *layers, nn.Linear(24, 3))
    plan = etp.trace(model, torch.randn(2, 8))
    keep = allocate(model, plan, draw_scores(plan, 5), budget=Budget(speed_up=speed_up, scope="local")).keep
    widths = [int(keep[group.name].sum()) for group in plan.prunable]
    assert len(widths) == 6
    assert max(widths) - min(widths) <= 2


def test_isomorphic_scope_ranks_within_classes() -> None:
    """Scores of one class on another scale: global ranking empties it, isomorphic ranking treats it like the rest."""
    model, plan = synthetic(6, width=64)
    scores = draw_scores(plan, 6)
    inner = [i for i, group in enumerate(plan.groups) if "b" in group.name and group.name.startswith("s")]
    for i, (_, span) in enumerate(plan.spans()):
        scores[span] *= 0.01 if i in inner else 1

    def shares(scope: Any) -> list[float]:
        keep = allocate(model, plan, scores, budget=Budget(speed_up=4, scope=scope)).flat(plan)
        wide = [(i in inner, keep[span]) for i, (group, span) in enumerate(plan.spans()) if group.n_units > 10]
        return [float(torch.cat([part for where, part in wide if where == x]).float().mean()) for x in (True, False)]

    low, high = shares("global")
    assert low < 0.2
    assert high > 0.9
    low, high = shares("isomorphic")
    assert abs(low - high) < 0.1


def test_balanced_scope_lies_between_the_local_and_the_global_one() -> None:
    """Of two groups, one with scores on a tenth of the scale: global ranking empties it, local ranking halves both."""
    model, plan = synthetic(5, width=64)
    scores = draw_scores(plan, 5)
    wide = [span for group, span in plan.spans() if group.n_units >= 64]
    scores[wide[0]] *= 0.1

    def share(scope: Any) -> float:
        keep = allocate(model, plan, scores, budget=Budget(speed_up=2, scope=scope)).flat(plan)
        return float(keep[wide[0]].float().mean())

    assert share("global") + 0.1 < share("balanced") < share("local") - 0.1


@pytest.mark.parametrize("scope", SCOPES)
def test_what_was_chosen_and_set_to_zero_is_chosen_again(scope: Any) -> None:
    """Methods set units to zero while a model trains, and surgery must remove these and no others."""
    for seed in range(6):
        model, plan = synthetic(seed, width=16)
        scores, budget = draw_scores(plan, seed), Budget(speed_up=2.5, scope=scope)
        first = allocate(model, plan, scores, budget=budget).flat(plan)
        again = allocate(model, plan, torch.where(first, scores, 0.0), budget=budget).flat(plan)
        assert torch.equal(again, first)


@pytest.mark.parametrize("scope", SCOPES)
def test_levels_of_a_group_go_lowest_first_also_with_scores_below_zero(scope: Any) -> None:
    for seed in range(4):
        _, plan = synthetic(seed, width=16)
        scores = draw_scores(plan, seed) - 0.5
        scores[torch.rand(len(scores), generator=torch.Generator().manual_seed(seed)) < 0.3] = 0
        levels = Levels(CostModel(plan), scores.double().numpy(), Budget(speed_up=2, scope=scope))
        assert all((np.diff(places) > 0).all() for places in levels.position)


def test_score_per_mac_prefers_dear_units() -> None:
    """With equal scores everywhere the dearest units go first, so fewer of them have to."""
    model, plan = synthetic(7, width=32)
    scores = torch.ones(plan.n_units)
    found = [allocate(model, plan, scores, budget=Budget(speed_up=2, rank=rank)) for rank in (None, *RANKS)]
    unsaid, plain, per_root, per_mac = found
    assert per_mac.n_removed <= per_root.n_removed < plain.n_removed
    assert torch.equal(unsaid.flat(plan), plain.flat(plan))


@pytest.mark.parametrize("what", ["macs", "params"])
def test_a_score_over_the_root_of_the_cost_counts_what_the_budget_counts(what: str) -> None:
    model, plan = synthetic(7, width=32)
    costs = CostModel(plan)
    target: dict[str, Any] = {what: getattr(costs.dense, what) // 3}
    scores = draw_scores(plan, 7) + 0.1
    by_rank = allocate(model, plan, scores, budget=Budget(**target, rank="score_per_sqrt_cost"))
    divided = scores / costs.marginal(what).clamp_min(1).sqrt()
    assert torch.equal(by_rank.flat(plan), allocate(model, plan, divided, budget=Budget(**target)).flat(plan))


@pytest.mark.parametrize("min_units", [1, 2])
def test_a_dead_group_falls_to_its_floor(min_units: int) -> None:
    """All scores zero in one group: it keeps its floor, and is not used to fill the budget up."""
    model, plan = synthetic(8, width=32)
    dense = CostModel(plan).dense.macs
    for group, span in plan.spans():
        if group.locked is None and group.kind == "channels":
            scores = draw_scores(plan, 8) + 0.1
            scores[span] = 0
            bare = torch.ones(plan.n_units, dtype=torch.bool)
            bare[span.start + 1 : span.stop] = False
            least = dense / CostModel(plan).evaluate(bare).macs
            for factor in np.linspace(1.1, 2, 8).tolist():
                found = allocate(model, plan, scores, budget=Budget(speed_up=least * factor, min_units=min_units))
                assert int(found.keep[group.name].sum()) == min_units


@pytest.mark.parametrize(("slack", "dead"), [(30, 1), (60, 11)])
def test_dead_units_fill_the_budget_up_only_to_reach_it(slack: int, dead: int) -> None:
    """A live level of 4 units costs 80, a dead unit 6: of a target of about 4000, 30 are within 1 %, 60 are not."""
    net = Builder()
    for name, n, width in (("live", 400, 10), ("dead", 50, 3)):
        before, after = net.tensor(f"{name}.before", n, width), net.tensor(f"{name}.after", width, n)
        net.group(name, n, [before], [(after, 1, 0)], multiple=4 if name == "live" else 1)
        net.ops += [Op(name=t, coefficient=1, axes=((t, 0), (t, 1))) for t in (before, after)]
    scores = torch.cat([torch.arange(1.0, 401.0), torch.zeros(50)])
    keep = allocate(net.model, net.plan(), scores, budget=Budget(macs=4006 + slack)).keep
    assert int(keep["live"].sum()) == 200
    assert int(keep["dead"].sum()) == dead


def test_of_equal_scores_the_first_units_stay() -> None:
    plan = toy_plan()
    keep = allocate(Toy(), plan, torch.ones(plan.n_units), budget=Budget(speed_up=3)).keep
    for mask in keep.values():
        assert torch.equal(mask, torch.arange(len(mask)) < mask.sum())


@pytest.mark.parametrize("budget", [Budget(speed_up=1), Budget(macs=10**9), Budget(params=795)])
def test_a_model_that_fits_keeps_everything(budget: Budget) -> None:
    plan = toy_plan()
    assert allocate(Toy(), plan, torch.zeros(plan.n_units), budget=budget).n_removed == 0


def test_nothing_is_changed() -> None:
    model, plan = Toy(), toy_plan()
    scores = draw_scores(plan, 0).requires_grad_()
    before, values = {n: t.clone() for n, t in model.state_dict().items()}, scores.detach().clone()
    allocate(model, plan, scores, budget=Budget(speed_up=2))
    assert torch.equal(scores, values)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
