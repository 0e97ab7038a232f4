"""A default device, or a model without storage, must not leak into plans, scores and selections."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

import etp_graph as etp
from etp_graph.compression._losers import acts_besides_force, find_losers
from tests.support.model_state import same, state_of
from tests.support.models.toy import Toy
from tests.support.recorded_batches import recorded


@pytest.fixture
def default_meta() -> Iterator[None]:
    """Tensors that name no device are created on one that holds no data: whoever forgets to name it fails."""
    with torch.device("meta"):
        yield


def job(model: nn.Module, x: torch.Tensor) -> str:
    plan = etp.trace(model, x)
    etp.verify(model, plan, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with etp.Regularizer(model, plan, order="random").attach(optimizer) as regularizer:
        model(x).square().mean().backward()
        optimizer.step()
        scores = etp.criteria.etp(model, plan, regularizer=regularizer)
    selection = etp.allocate(model, plan, scores, budget=etp.Budget(speed_up=2))
    etp.prune_(model, plan, selection, optimizer=optimizer)
    return plan.fingerprint + selection.to_json()


def test_a_default_device_changes_nothing() -> None:
    model, x = Toy(), torch.randn(2, 3, 8, 8)
    twin = copy.deepcopy(model)
    plain = job(model, x)
    with torch.device("meta"):
        other = job(twin, x)
    assert plain == other
    assert same(state_of(model), state_of(twin))


@pytest.mark.parametrize("name", [name for name in etp.criteria.CRITERIA if name != "reap"])  # it needs experts
def test_a_default_device_changes_no_score(name: str) -> None:
    model = Toy().eval()
    plan = etp.trace(model, torch.randn(2, 3, 8, 8))
    plan = plan.lock({"conv2": "passes through no batch norm"}) if name == "bn_scale" else plan

    def score() -> list[float]:
        options = {"record": recorded(model, plan, name)} if name in etp.criteria.COLLECTED else {}
        return etp.criteria.CRITERIA[name](model, plan, **options).tolist()  # type: ignore[no-any-return]

    plain = score()
    with torch.device("meta"):
        assert score() == plain


@pytest.mark.parametrize("name", ["sfp", "greg1", "greg2"])
def test_a_default_device_changes_no_choice(name: str) -> None:
    """Of the units that a method acts on while training."""
    method = replace(etp.methods.get(name), soft_every=2 if name == "sfp" else 0)

    def trained(model: nn.Module) -> nn.Module:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        plan = etp.trace(model, x)
        regularizer = method.regularizer(model, plan, steps=4)
        who = find_losers(model, plan, method, etp.Budget(speed_up=2, scope="local"))
        acts = acts_besides_force(method, regularizer, who, model=model, plan=plan, steps=4)
        assert acts is not None
        for one in (regularizer, acts):
            if one is not None:
                one.attach(optimizer)
        for _ in range(4):
            model(x).square().mean().backward()
            optimizer.step()
        acts.detach()
        return model

    model, x = Toy(), torch.randn(2, 3, 8, 8)
    twin = copy.deepcopy(model)
    plain = trained(model)
    with torch.device("meta"):
        assert same(state_of(plain), state_of(trained(twin)))


@pytest.mark.usefixtures("default_meta")
def test_a_model_without_storage_can_be_planned_and_cut() -> None:
    model, x = Toy(), torch.randn(1, 3, 8, 8)
    plan = etp.trace(model, x)
    assert plan.device == "meta"
    scores = torch.arange(plan.n_units, device="cpu") % 7
    selection = etp.allocate(model, plan, scores, budget=etp.Budget(speed_up=2))
    etp.prune_(model, plan, selection)
    assert sum(p.numel() for p in model.parameters()) == etp.cost(model, etp.trace(model, x)).params
    assert model(x).shape == (1, 5)
