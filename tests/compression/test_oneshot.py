"""Pruning without training: the budget is met, the parts are those of the single functions, errors change nothing."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import etp_graph as etp


def small_net() -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    etp.recovery.reestimate_batch_norms_(net, batches(8))  # the statistics of a trained network
    return net


def batches(count: int = 3) -> list[Tensor]:
    return [torch.randn(8, 3, 8, 8) for _ in range(count)]


def relative_error(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((a(x) - b(x)).norm() / b(x).norm())


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch), torch.zeros(len(batch), dtype=torch.long))


@pytest.mark.parametrize("criterion", ["magnitude", "activation", "taylor"])
def test_the_budget_is_met_and_compensation_lowers_the_error(criterion: str) -> None:
    dense, data = small_net(), batches()
    models = [copy.deepcopy(dense), copy.deepcopy(dense)]
    for model, compensate in zip(models, (False, True), strict=True):
        found = etp.oneshot_(model, data, speed_up=1.5, criterion=criterion, compensate=compensate, loss=loss)
        assert found.dense.macs >= 1.5 * found.pruned.macs
        assert found.pruned.macs == etp.trace(model, data[0], prune="all", check=False).dense.macs
    x = torch.randn(64, 3, 8, 8)
    assert relative_error(models[1], dense, x) < 0.7 * relative_error(models[0], dense, x)


def test_the_result_is_that_of_the_single_functions() -> None:
    model, data = small_net(), batches()
    other = copy.deepcopy(model)
    found = etp.oneshot_(model, data, params=300, batch_norms=True)
    plan = etp.trace(other, data[0])
    selection = etp.allocate(other, plan, etp.criteria.magnitude(other, plan), budget=etp.Budget(params=300))
    etp.recovery.compensate_(other, plan, selection, data)
    etp.prune_(other, plan, selection)
    assert etp.recovery.reestimate_batch_norms_(other, data) == found.norms == 2
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert list(found.seconds) == ["trace", "calibrate", "allocate", "compensate", "prune", "batch norms"]


def test_an_iterator_of_batches_is_read_once() -> None:
    model, data = small_net(), batches()
    other = copy.deepcopy(model)
    etp.oneshot_(model, iter(data), speed_up=1.5)
    etp.oneshot_(other, data, speed_up=1.5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": [], "speed_up": 2}, "batches is empty"),
        ({"batches": batches(1), "speed_up": 2, "criterion": "taylor"}, "pass loss="),
        ({"batches": [*batches(1), torch.randn(2, 5, 8, 8)], "speed_up": 2}, "batch 2"),
        ({"batches": batches(1)}, "exactly one"),
        ({"batches": batches(1), "speed_up": 10**6}, "out of reach"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict[str, object], message: str) -> None:
    model = small_net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = arguments.pop("batches")
    with pytest.raises(etp.EtpError, match=message):
        etp.oneshot_(model, data, **arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_of_the_user_stay_also_after_an_error() -> None:
    model, data = small_net(), batches()
    kept = [torch.ones_like(p) for p in model.parameters()]
    for parameter, gradient in zip(model.parameters(), kept, strict=True):
        parameter.grad = gradient

    def failing(model: nn.Module, batch: Tensor) -> Tensor:
        if batch is data[1]:
            raise RuntimeError("the loss of the user")
        return loss(model, batch)

    with pytest.raises(RuntimeError, match="the loss of the user"):
        etp.oneshot_(model, data, speed_up=1.5, criterion="taylor", loss=failing)
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), kept, strict=True))
    assert all(bool((gradient == 1).all()) for gradient in kept)
