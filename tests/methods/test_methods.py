"""Presets: complete, told apart by data alone, and the same after a trip through JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from etp_graph import criteria, forces, methods, schedules, trace
from etp_graph.budget import Budget
from etp_graph.errors import BudgetError, EtpError, ForceError, ScoreError
from etp_graph.methods import METHODS, Method, get, scales_only
from tests.support.models.toy import Toy, toy_plan
from tests.support.recorded_batches import recorded

NEEDS_NORMS = {"network-slimming"}


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


@pytest.mark.parametrize("name", METHODS)
def test_round_trip_through_json(name: str) -> None:
    method = replace(get(name), strength=schedules.warm_up(0.2), rounds=3, schedule=schedules.iterative(3))
    assert Method.from_json(method.to_json()) == method
    assert Method.from_json(json.loads(method.to_json())) == method
    assert Method.from_json(get(name).to_json()) == get(name)


@pytest.mark.parametrize("name", METHODS)
def test_every_preset_says_its_name_and_source(name: str) -> None:
    assert get(name).name == name
    assert get(name).source


@pytest.mark.parametrize("name", sorted(METHODS.keys() - NEEDS_NORMS))
def test_scores_and_regularizer_fit_the_plan(name: str) -> None:
    model, plan, method = toy(), toy_plan(), get(name)
    record = recorded(model, plan, method.criterion) if method.collected else None
    scores = method.scores(model, plan, record=record)
    assert scores.shape == (plan.n_units,)
    assert bool((scores.isfinite() & (scores >= 0)).all())
    assert all(torch.equal(a, b) for a, b in zip(toy().parameters(), model.parameters(), strict=True))
    regularizer = method.regularizer(model, plan, steps=5, budget=Budget(speed_up=2.0))
    assert (regularizer is None) == (method.force is None)
    if regularizer is not None:
        assert regularizer.settings.force == method.force
        assert regularizer.settings.beta == method.beta
        assert regularizer.settings.mode == method.mode


def test_the_torque_is_that_of_the_methods_own_force() -> None:
    model, plan = toy(), toy_plan()
    method = replace(get("etp"), force=forces.Heaviside(threshold=0.7))
    regularizer = method.regularizer(model, plan, steps=5, budget=Budget(speed_up=2.0))
    assert torch.equal(method.scores(model, plan), criteria.etp(model, plan, regularizer=regularizer))
    assert not torch.equal(method.scores(model, plan), get("etp").scores(model, plan))


def test_options_reach_the_criterion() -> None:
    model, plan = toy(), toy_plan()
    method = Method(name="mine", criterion="magnitude", p=1, normalize="sum")
    assert torch.equal(method.scores(model, plan), criteria.magnitude(model, plan, p=1, normalize="sum"))
    other = Method(name="mine", criterion="random", seed=7)
    assert torch.equal(other.scores(model, plan), criteria.random(model, plan, seed=7))


def test_network_slimming_pulls_on_the_scales_and_on_nothing_else() -> None:
    model, plan = toy(), toy_plan()
    method = replace(get("network-slimming"), beta=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.no_grad():
        model.norm.weight[::2] *= -1
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    regularizer = method.regularizer(model, plan)
    assert regularizer is not None
    with regularizer.attach(optimizer):
        optimizer.step()
    for name, p in model.named_parameters():
        if name == "norm.weight":  # the subgradient of β·|γ|
            assert torch.allclose(p, before[name] - 0.5 * before[name].sign())
        else:
            assert torch.equal(p, before[name]), name
    assert scales_only(model, plan).offsets == plan.offsets


def test_network_slimming_names_groups_without_norms() -> None:
    with pytest.raises(ScoreError, match="conv2"):
        get("network-slimming").scores(toy(), toy_plan())


def test_unknown_name_lists_all_names() -> None:
    with pytest.raises(ForceError) as caught:
        get("etpp")
    assert all(name in str(caught.value) for name in METHODS)
    with pytest.raises(ForceError):
        get(3)  # type: ignore[arg-type]
    mine = Method(name="mine")
    assert get(mine) is mine


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"beta": -1}, ForceError), ({"order": "best"}, ForceError), ({"force": "exponential"}, ForceError),
        ({"acts_on": "norms"}, ForceError), ({"criterion": "rank"}, ScoreError), ({"criterion": None}, ScoreError),
        ({"soft_every": -1}, ForceError), ({"soft_every": 1.0}, ForceError), ({"select_at": 1}, ForceError),
        ({"select_at": 0.5}, ForceError), ({"acts_on": "losers"}, ForceError),
        ({"acts_on": "losers", "force": forces.ridge(), "order": "random"}, ForceError),
        ({"soft_every": 5, "criterion": "taylor"}, ForceError),
        ({"force": forces.lasso(), "mode": "prox"}, ForceError),
        ({"p": 0}, ScoreError), ({"normalize": "median"}, ScoreError), ({"scope": "all"}, BudgetError),
        ({"rank": "size"}, BudgetError), ({"rounds": 0}, ForceError), ({"rounds": 1.0}, ForceError),
        ({"schedule": schedules.Constant(value=0.5)}, ForceError), ({"name": ""}, ForceError),
        ({"schedule": schedules.cubic}, ForceError),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(values: dict[str, object], error: type[EtpError]) -> None:
    with pytest.raises(error):
        Method(**{"name": "mine", **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"name": "x", "colour": 1}', '{"name": "x", "force": {"name": "?"}}']
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ForceError):
        Method.from_json(text)


def test_a_rising_strength_needs_the_number_of_steps() -> None:
    method = replace(get("etp-heaviside"), strength=schedules.warm_up(0.5))
    with pytest.raises(ForceError, match="steps="):
        method.regularizer(toy(), toy_plan())
    regularizer = method.regularizer(toy(), toy_plan(), steps=10)
    assert regularizer is not None
    assert regularizer.strength == 0


def test_presets_are_a_mapping_by_name() -> None:
    assert list(METHODS) == [method.name for method in METHODS.values()]
    assert methods.get("etp") is METHODS["etp"]


def test_forces_have_a_value_for_each_unit_where_they_find_no_tensor() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    plan = trace(model, torch.randn(1, 4))
    found = methods.get("network-slimming").regularizer(model, plan, steps=1)
    assert found is not None
    assert found.forces().shape == (plan.n_units,)
