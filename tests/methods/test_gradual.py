"""Gradual pruning: who is set to zero when, against Zhu & Gupta's schedule and the criteria written out as loops."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import etp_graph as etp
from benchmarks.contest.variants import CONTROLS
from etp_graph import forces, methods, schedules
from etp_graph.errors import ForceError
from etp_graph.methods import Method
from etp_graph.plan import CostModel, Plan
from etp_graph.regularizer import Regularizer
from tests.support.forced_toy import batches, norms_of, positions, toy, train
from tests.support.models.toy import toy_plan
from tests.support.training_loops import run
from tests.support.training_loops import toy as float_toy

STEPS = 40
BUDGET = etp.Budget(speed_up=3.0)
GRADUAL = [methods.get("l1-gradual"), methods.get("taylor-gradual"), *(m for m in CONTROLS.values() if m.steered)]
every = pytest.mark.parametrize("method", GRADUAL, ids=lambda method: method.name)
masked = pytest.mark.parametrize("method", [m for m in GRADUAL if m.mode == "mask"], ids=lambda method: method.name)


def zeros(model: nn.Module, plan: Plan) -> Tensor:
    """Units of groups that are not locked whose numbers are all exactly zero, bool [n_units]."""
    open_units = torch.zeros(plan.n_units, dtype=torch.bool)
    for group, span in plan.spans():
        open_units[span] = group.locked is None
    return (norms_of(model, plan) == 0) & open_units


def macs_without(gone: Tensor, plan: Plan) -> int:
    return int(CostModel(plan).evaluate(~gone).macs)


def watch(method: Method, steps: int = STEPS, **changed: Any) -> tuple[nn.Module, list[Tensor], Regularizer]:
    """Train the toy under the method; the model, the units at zero after each step, and the regularizer."""
    model, plan, seen = toy(), toy_plan(), []
    found = replace(method, **changed).regularizer(model, plan, steps=steps, budget=BUDGET)
    assert found is not None
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    with found.attach(optimizer):
        for batch in batches(steps):
            train(model, optimizer, [batch])
            seen.append(zeros(model, plan))
    return model, seen, found


@every
def test_the_units_at_zero_meet_the_budget_at_the_end_and_stay_there(method: Method) -> None:
    _, seen, _ = watch(method)
    plan = toy_plan()
    assert macs_without(seen[-1], plan) <= BUDGET.target(plan.dense)
    for before, after in pairwise(seen):
        assert method.mode != "mask" or not bool((before & ~after).any())


@masked
def test_the_cubic_schedule_is_followed_from_the_first_step_of_each_interval(method: Method) -> None:
    """s_t = s_f + (s_i - s_f)(1 - (t - t0)/(n Δt))³ with s_i = 0: the saving at the end of the interval that begins."""
    end = 0.5
    _, seen, _ = watch(method, strength=schedules.Cubic(end=end))
    plan, interval = toy_plan(), STEPS // 10
    dense, target = plan.dense.macs, BUDGET.target(plan.dense)
    for step, gone in enumerate(seen):
        t = min(1.0, (step // interval + 1) * interval / STEPS / end)
        share = 1 + (0 - 1) * (1 - t) ** 3
        assert macs_without(gone, plan) <= dense - int(share * (dense - target))
        assert step % interval == 0 or torch.equal(gone, seen[step - 1])


@masked
def test_no_force_acts_on_units_that_stay(method: Method) -> None:
    model, plan = toy(), toy_plan()
    before = norms_of(model, plan)
    found = method.regularizer(model, plan, steps=STEPS, budget=BUDGET)
    assert found is not None
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with found.attach(optimizer := SGD(model.parameters(), lr=0.1)):
        optimizer.step()
    gone = zeros(model, plan)
    assert bool(gone.any())
    kept = [i for i in positions(model, plan) if not gone[i[0]]]
    fresh = toy()
    alone = {(name, axis, at) for _, name, axis, at in kept}
    for name, axis, at in alone:
        now, then = model.get_parameter(name).select(axis, at), fresh.get_parameter(name).select(axis, at)
        assert bool(((now == then) | (now == 0)).all())
    assert float(found.strength) == 0
    assert before.shape == gone.shape


def test_the_units_of_least_l1_norm_go_the_same_share_of_every_group() -> None:
    """The first choice, recomputed: Σ|w| over all numbers of a unit, ranks within its group."""
    model, plan = toy(), toy_plan()
    sums = torch.zeros(plan.n_units, dtype=torch.float64)
    for unit, name, axis, at in positions(model, plan):
        sums[unit] += model.get_parameter(name).detach().select(axis, at).abs().sum()
    method = replace(methods.get("l1-gradual"), strength=schedules.OneShot(start=0.0))
    found = method.regularizer(model, plan, steps=1, budget=BUDGET)
    assert found is not None
    with found.attach(optimizer := SGD(model.parameters(), lr=0.0)):
        train(model, optimizer, batches(1))
    gone = zeros(model, plan)
    for group, span in plan.spans():
        if group.locked is None:
            n = int(gone[span].sum())
            assert set(sums[span].argsort()[:n].tolist()) == set(gone[span].nonzero().flatten().tolist())
    local = etp.Budget(speed_up=3.0, scope="local")
    assert torch.equal(~gone, etp.allocate(toy(), plan, sums, budget=local).flat(plan))


def test_the_effect_on_the_loss_is_that_of_molchanov() -> None:
    """After one observed batch: 0.1 (Σ_s ⟨∇_s L, w_s⟩)² of each unit is in the running mean; its root is the score."""
    model, plan = toy(), toy_plan()
    data = batches(1)[0]
    nn.functional.cross_entropy(model(data[0]), data[1]).backward()
    products = torch.zeros(plan.n_units, dtype=torch.float64)
    for unit, name, axis, at in positions(model, plan):
        w = model.get_parameter(name)
        assert w.grad is not None
        products[unit] += (w.detach().select(axis, at) * w.grad.select(axis, at)).sum()
    seen: list[Tensor] = []
    settings: dict[str, Any] = {"beta": "auto", "mode": "mask", "acts_on": "losers", "chosen_by": "criterion"}
    found = Regularizer(model, plan, force=forces.uniform(), steps=1, budget=BUDGET, **settings)

    def score(effects: Tensor) -> Tensor:
        seen.append(effects.clone())
        return effects

    found.choose_losers_by(score, effects=True)
    with found.attach(optimizer := SGD(model.parameters(), lr=0.0)):
        train(model, optimizer, [data])
    torch.testing.assert_close(seen[0], (0.1 * products.square()).sqrt())


def test_etp_hard_zeroes_at_once_what_etp_chooses_and_the_uniform_force_pushes_the_same_units() -> None:
    """Without gradients all three choose from the same weights, so their first losers are the same."""
    first = {}
    for name in ("etp", "etp-hard", "etp-uniform-force"):
        method = CONTROLS.get(name) or methods.get(name)
        model, plan = toy(), toy_plan()
        found = replace(method, chosen_by="need").regularizer(model, plan, steps=STEPS, budget=BUDGET)
        assert found is not None
        with found.attach(optimizer := SGD(model.parameters(), lr=0.0)):
            optimizer.step()
            assert found._steering is not None
            first[name] = found._steering.losers.clone()
            assert bool(zeros(model, plan)[first[name]].all()) == (name == "etp-hard")
            norms = [norms_of(model, plan)]
            optimizer.step()
            norms.append(norms_of(model, plan))
        if name == "etp-uniform-force":
            lost = ((norms[0] - norms[1]) / found.kappa)[first[name] & (norms[1] > 0)]
            assert float(lost.max() / lost.min()) < 1.1  # not 1: a weight between two losers shrinks twice
    assert 0 < int(first["etp"].sum()) < 14
    assert torch.equal(first["etp"], first["etp-hard"])
    assert torch.equal(first["etp"], first["etp-uniform-force"])


@every
def test_surgery_after_the_phase_changes_nothing(method: Method) -> None:
    result = run(float_toy(), method=method, plan=toy_plan(), speed_up=2)
    assert result.metric_pruned == pytest.approx(result.metric_sparse, rel=1e-4)
    assert result.speed_up >= 2


@every
def test_to_json_and_back(method: Method) -> None:
    assert Method.from_json(method.to_json()) == method


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "mask"}, "losers"),
        ({"chosen_by": "criterion"}, "auto"),
        ({"need_force": forces.uniform()}, "auto"),
        ({"beta": "auto", "need_force": forces.growing(), "budget": BUDGET, "steps": 2}, "growing"),
        ({"beta": "auto", "force": forces.lasso(), "budget": BUDGET, "steps": 2, "mode": "mask"}, "lasso"),
        ({"need_force": "uniform"}, "parentheses"),
    ],
)
def test_settings_that_contradict_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ForceError, match=message):
        Regularizer(toy(), toy_plan(), **values)


def test_a_regularizer_without_its_criterion_says_so_and_changes_nothing() -> None:
    model, plan = toy(), toy_plan()
    settings: dict[str, Any] = {"beta": "auto", "mode": "mask", "budget": BUDGET, "steps": 4}
    found = Regularizer(model, plan, chosen_by="criterion", **settings)
    with (
        found.attach(optimizer := SGD(model.parameters(), lr=0.0)),
        pytest.raises(ForceError, match="choose_losers_by"),
    ):
        optimizer.step()
    assert not bool(zeros(model, plan).any())
    found.choose_losers_by(lambda effects: effects[:3])
    with found.attach(optimizer := SGD(model.parameters(), lr=0.0)), pytest.raises(ForceError, match="19 units"):
        optimizer.step()
    with pytest.raises(ForceError, match="chosen_by='need'"):
        Regularizer(model, plan, **settings).choose_losers_by(lambda effects: effects)


def test_a_criterion_that_needs_activations_cannot_choose_while_training() -> None:
    with pytest.raises(ForceError, match="hrank"):
        replace(methods.get("taylor-gradual"), criterion="hrank")
