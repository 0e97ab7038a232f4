"""Torque as Gupta et al. 2024 publish it, against its equations written out as loops over filters and layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.optim import SGD

import etp_graph as etp
from etp_graph import methods
from etp_graph.errors import BudgetError
from etp_graph.plan import CostModel
from tests.support.models.toy import Toy, toy_plan
from tests.support.training_loops import run, toy

LAMBDA = 1e-3


def step_once(name: str = "torque-published") -> tuple[Toy, Toy]:
    """The toy before and after a step of size 1 without a loss."""
    before, model = toy(), toy()
    found = replace(methods.get(name), beta=LAMBDA).regularizer(model, toy_plan())
    assert found is not None
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with found.attach(optimizer := SGD(model.parameters(), lr=1.0)):
        optimizer.step()
    return before, model


def test_the_gradient_is_the_l1_torque_on_filters() -> None:
    """Equation 13: ∂L/∂W_n += λ_T · d_n · sign(W_n) with d_n = n, filter 0 being the pivot."""
    before, after = step_once()
    for old, new in ((before.conv1, after.conv1), (before.conv2, after.conv2)):
        for n in range(len(old.weight)):
            torch.testing.assert_close(new.weight[n], old.weight[n] - LAMBDA * n * old.weight[n].sign())


def test_nothing_but_filters_of_layers_that_are_pruned_is_pushed() -> None:
    before, after = step_once()
    for name in ("norm.weight", "norm.bias", "conv2.bias", "linear.weight", "linear.bias"):
        assert torch.equal(before.get_parameter(name), after.get_parameter(name)), name


@pytest.mark.parametrize("n", [1, 3, 5])
def test_one_threshold_over_all_layers_removes_the_filters_of_least_mean_weight(n: int) -> None:
    """Asked for what the n filters of least mean |w| of both layers cost, it removes these n."""
    model, plan = toy(), toy_plan()
    means = [float(w.detach().abs().mean()) for layer in (model.conv1, model.conv2) for w in layer.weight]
    keep = torch.ones(plan.n_units, dtype=torch.bool)
    for unit in sorted(range(len(means)), key=means.__getitem__)[:n]:
        keep[unit] = False
    method = replace(methods.get("torque-published"), max_ratio=None)
    budget = method.with_rules(etp.Budget(params=CostModel(plan).evaluate(keep).params))
    assert torch.equal(etp.allocate(model, plan, method.scores(model, plan), budget=budget).flat(plan), keep)


@pytest.mark.parametrize(("name", "least"), [("torque-published", (3, 2)), ("torque-published-mf5", (5, 5))])
def test_every_layer_keeps_the_minimum_of_filters(name: str, least: tuple[int, int]) -> None:
    """30 % of 8 and of 6 filters, rounded up; or 5."""
    result = run(toy(), method=name, plan=toy_plan(), speed_up=1.6)
    flat = result.selections[0].flat(toy_plan())
    for (group, span), n in zip(toy_plan().spans(), least, strict=False):
        assert int(flat[span].sum()) >= n, group.name
    with pytest.raises(BudgetError, match="out of reach"):
        run(toy(), method=name, plan=toy_plan(), speed_up=50)


def test_the_stricter_rule_of_method_and_budget_holds() -> None:
    method = replace(methods.get("torque-published"), min_units=4)
    rules = method.with_rules(etp.Budget(speed_up=2, min_units=2, max_ratio=0.9))
    assert (rules.min_units, rules.max_ratio) == (4, 0.7)
    rules = method.with_rules(etp.Budget(speed_up=2, min_units=6, max_ratio=0.5))
    assert (rules.min_units, rules.max_ratio) == (6, 0.5)


@pytest.mark.parametrize("values", [{"min_units": 0}, {"max_ratio": 1.5}, {"min_units": 2.0}])
def test_rules_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(BudgetError):
        methods.Method(name="mine", **values)  # type: ignore[arg-type]


def test_a_dead_filter_far_from_the_pivot_goes_before_a_used_one_near_it() -> None:
    """The score n·‖w‖ of ``torque`` may prefer the far one; the mean |w| does not."""
    model = toy()
    with torch.no_grad():
        model.conv1.weight[7].mul_(1e-3)
        model.conv1.weight[0].fill_(0.2)
    scores = methods.get("torque-published").scores(model, toy_plan())
    assert float(scores[7]) == float(scores[:14].min())
