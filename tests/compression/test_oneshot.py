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
    found = etp.oneshot_(model, data, params=300, batch_norms=True, blend=1)
    plan = etp.trace(other, data[0])
    selection = etp.allocate(other, plan, etp.criteria.magnitude(other, plan), budget=etp.Budget(params=300))
    etp.recovery.compensate_(other, plan, selection, data)
    etp.prune_(other, plan, selection)
    assert etp.recovery.reestimate_batch_norms_(other, data) == found.norms == 2
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert list(found.seconds) == ["trace", "calibrate", "allocate", "compensate", "blend", "prune", "batch norms"]


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


class WithLogits(nn.Module):
    """A classifier of tokens that returns a field ``logits``, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.last = nn.Embedding(20, 12), nn.Linear(12, 32), nn.Linear(32, 20)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"logits": self.last(self.hidden(self.table(tokens)).relu())}


def tokens(count: int = 3) -> list[dict[str, Tensor]]:
    return [{"tokens": torch.randint(20, (4, 16))} for _ in range(count)]


def test_models_with_logits_need_no_loss_and_keep_their_flags() -> None:
    model, data = WithLogits(), tokens()
    model.table.weight.requires_grad_(False)
    other = copy.deepcopy(model)
    found = etp.oneshot_(model, data, params=0.7)
    same = etp.oneshot_(other, data, params=0.7, criterion="fisher", loss=etp.collect.OwnLabels())
    assert all(torch.equal(a, same.selection.keep[name]) for name, a in found.selection.keep.items())
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("criterion", ["fisher", "kron_obs", "obs", "wanda", "flap", "taylor"])
def test_units_that_are_silent_go_first(criterion: str) -> None:
    model, data = WithLogits(), tokens()
    model.hidden.bias.data[5:15] = -1e3  # the ReLU is never open
    found = etp.oneshot_(model, data, params=0.75, criterion=criterion)
    keep = found.selection.keep["hidden"]
    assert int((~keep).sum()) > 3 and not bool((~keep)[[*range(5), *range(15, 32)]].any())


def test_recorded_moments_give_the_same_model_as_the_batches() -> None:
    model, data = WithLogits(), tokens()
    other = copy.deepcopy(model)
    moments = etp.recovery.input_moments(model, etp.trace(model, data[0]), data)
    etp.oneshot_(model, data, params=0.7, compensate=moments)
    etp.oneshot_(other, data, params=0.7)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("criterion", ["fisher", "kron_obs", "obs", "wanda", "flap", "magnitude"])
@pytest.mark.parametrize("bad", ["vocabulary", "NaN", "second batch"])
def test_bad_batches_change_nothing(bad: str, criterion: str) -> None:
    model, data = WithLogits(), tokens()
    if bad == "vocabulary":
        data = [{"tokens": torch.full((4, 16), 25)}]
    elif bad == "NaN":
        model.table.weight.data[3] = torch.nan
        data = [{"tokens": torch.full((4, 16), 3)}]
    else:
        data[1] = {"tokens": torch.full((4, 16), 25)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(etp.EtpError):
        etp.oneshot_(model, data, params=0.7, criterion=criterion)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("ridge", [1e-3, 0.0])
def test_fewer_samples_than_units_and_singular_moments_have_a_solution(ridge: float) -> None:
    model = WithLogits()
    data = [{"tokens": torch.tensor([[1, 2], [2, 1]])}]  # two different inputs for 32 units
    dense = copy.deepcopy(model)
    found = etp.oneshot_(model, data, params=0.7, criterion="kron_obs", ridge=ridge)
    assert found.compensation is not None and found.compensation.layers[0].after < 0.05
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    error = (model(**data[0])["logits"] - dense(**data[0])["logits"]).norm() / dense(**data[0])["logits"].norm()
    assert float(error) < 0.05
