"""What a regularizer refuses, by name and before anything has changed; and its settings as JSON."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from etp_graph import forces, schedules
from etp_graph.errors import ForceError, PlanError
from etp_graph.regularizer import Regularizer, RegularizerSettings
from tests.support.forced_toy import (
    MODES,
    batches,
    loss_of,
    same,
    toy,
)
from tests.support.models.toy import Toy, toy_plan


def test_units_with_a_frozen_slice_are_left_alone_with_a_warning() -> None:
    model, plan = toy(), toy_plan()
    model.norm.bias.requires_grad_(False)
    before = copy.deepcopy(model)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    reg = Regularizer(model, plan, beta=0.1)
    with pytest.warns(UserWarning, match=r"'norm\.bias' is frozen.*'conv1'"):
        reg.attach(optimizer)
    assert reg.forces()[:8].tolist() == [0.0] * 8
    assert bool((reg.forces()[8:14] > 0).all())
    optimizer.step()
    assert same(before.norm, model.norm)
    assert torch.equal(before.conv1.weight, model.conv1.weight)
    assert not torch.equal(before.linear.weight, model.linear.weight)
    model.conv2.requires_grad_(False)
    with pytest.raises(ForceError, match="no unit is left"):
        optimizer.step()
    reg.detach()
    with pytest.raises(ForceError, match="no unit is left"):
        reg.attach(optimizer)


def _pruned(model: Toy) -> None:
    model.conv1.weight.data = model.conv1.weight.data[:7]


def _moved(model: Toy) -> None:
    model.to("meta")


def _replaced(model: Toy) -> None:
    model.conv1.weight = nn.Parameter(model.conv1.weight.detach().clone())


@pytest.mark.parametrize("change", [_pruned, _moved, _replaced])
@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_changed_under_the_hooks_is_refused_before_the_step(
    change: Callable[[Toy], None], mode: Any
) -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    Regularizer(model, toy_plan(), mode=mode).attach(optimizer)
    loss_of(model, batches(1)[0]).backward()
    bias = model.linear.bias.detach().clone()
    change(model)
    with pytest.raises((PlanError, ForceError), match=r"conv1\.weight"):
        optimizer.step()
    assert model.linear.bias.is_meta or torch.equal(bias, model.linear.bias)


def test_an_optimizer_without_all_parameters_is_refused_by_name() -> None:
    model = toy()
    reg = Regularizer(model, toy_plan())
    with pytest.raises(ForceError, match=r"does not hold 'norm\.weight', 'norm\.bias'"):
        reg.attach(SGD([p for n, p in model.named_parameters() if "norm" not in n], lr=0.1))
    with pytest.raises(ForceError, match="not StepLR"):
        reg.attach(torch.optim.lr_scheduler.StepLR(SGD(model.parameters(), lr=0.1), 1))  # type: ignore[arg-type]
    reg.attach(SGD([p for n, p in model.named_parameters() if n != "linear.bias"], lr=0.1))  # locked group only
    with pytest.raises(ForceError, match="already attached"):
        reg.attach(SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    "arguments",
    [
        {"beta": -1e-4}, {"beta": float("nan")}, {"beta": float("inf")}, {"beta": "auto"}, {"mode": "hard"},
        {"order": "alphabetic"}, {"kappa": "two"}, {"every": 0}, {"every": 1.5}, {"refresh_every": -1},
        {"refresh_every": 5}, {"schedule": schedules.cubic()}, {"schedule": schedules.cubic, "steps": 4},
        {"force": forces.exponential}, {"steps": 0}, {"mode": "loss", "every": 2}, {"seed": None},
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ForceError, match=next(iter(arguments))):
        Regularizer(toy(), toy_plan(), **arguments)


def test_plans_and_weights_that_cannot_work_are_refused() -> None:
    with pytest.raises(PlanError, match="no group"):
        Regularizer(toy(), toy_plan().lock({"conv1": "kept", "conv2": "kept"}))
    with pytest.raises(PlanError, match="lacks"):
        Regularizer(nn.Linear(2, 2), toy_plan())
    model = toy()
    model.norm.weight.data[0] = torch.nan
    with pytest.raises(ForceError, match=r"'norm\.weight'.*NaN"):
        Regularizer(model, toy_plan())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s.pop("plan"), lambda s: s.update(format=99), lambda s: s.update(plan="0" * 64),
        lambda s: s.update(distance=torch.zeros(3)), lambda s: s["pending"].fill_(torch.nan),
        lambda s: s.update(steps_done=-1), lambda s: s["settings"].update(beta=0.5),
    ],
)  # fmt: skip
def test_a_damaged_state_is_refused_and_changes_nothing(spoil: Callable[[dict[str, Any]], object]) -> None:
    reg = Regularizer(toy(), toy_plan(), order="random")
    state = reg.state_dict()
    spoil(state)
    kept = reg.distances()
    with pytest.raises((ForceError, PlanError)):
        reg.load_state_dict(state)
    assert torch.equal(reg.distances(), kept)
    assert reg.steps_done == 0


@pytest.mark.parametrize(
    ("force", "schedule"), list(itertools.product([f() for f in forces.FORCES.values()], [None, schedules.cubic()]))
)
def test_settings_to_json_and_back(force: forces.Force, schedule: schedules.Schedule | None) -> None:
    settings = RegularizerSettings(force=force, schedule=schedule, steps=7, beta=0.3, order="random", mode="gradient")
    assert RegularizerSettings.from_json(settings.to_json()) == settings
    for text in ("[]", "{", "{}", '{"force": {"name": "linear"}, "color": 1}'):
        with pytest.raises(ForceError):
            RegularizerSettings.from_json(text)
