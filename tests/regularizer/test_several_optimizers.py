"""Several optimizers that share a model train as one, and a damaged state is one documented error."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import etp_graph as etp
from etp_graph.errors import ForceError, PlanError
from etp_graph.regularizer import Regularizer
from tests.support.forced_toy import batches, loss_of, same, toy, train
from tests.support.models.toy import Toy, toy_plan

SETTINGS: dict[str, dict[str, Any]] = {
    "prox": {"mode": "prox", "beta": 1e-2, "every": 2},
    "gradient": {"mode": "gradient", "beta": 1e-2, "order": "importance", "refresh_every": 3},
    "loss": {"mode": "loss", "beta": 1e-2},
    "steered": {"beta": "auto", "budget": etp.Budget(speed_up=1.5), "steps": 10, "chosen_by": "need-taylor"},
}


def parts(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the matrices of a model, and its other parameters."""
    every = list(model.parameters())
    return [p for p in every if p.ndim > 1], [p for p in every if p.ndim < 2]


def train_together(model: nn.Module, optimizers: list[Optimizer], n: int, reg: Regularizer | None = None) -> None:
    for batch in batches(n):
        for optimizer in optimizers:
            optimizer.zero_grad()
        penalty = reg.penalty() if reg is not None and reg.settings.mode == "loss" else 0
        (loss_of(model, batch) + penalty).backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("turned", [False, True])
def test_two_optimizers_are_one_that_is_divided(name: str, turned: bool) -> None:
    models = toy(), toy()
    whole = Regularizer(models[0], toy_plan(), **SETTINGS[name])
    divided = Regularizer(models[1], toy_plan(), **SETTINGS[name])
    one = SGD(models[0].parameters(), lr=0.05, momentum=0.9)
    both: list[Optimizer] = [SGD(part, lr=0.05, momentum=0.9) for part in parts(models[1])]
    with whole.attach(one):
        train(models[0], one, batches(10), whole.penalty if name == "loss" else None)
    with divided.attach(both):
        train_together(models[1], both[::-1] if turned else both, 10, divided)
    assert whole.steps_done == divided.steps_done == 10
    if name == "steered":  # sums over the parameters of both are added in another order
        pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
        assert max(float((a - b).detach().abs().max()) for a, b in pairs) < 1e-12
    else:
        assert same(*models)
    assert all(not optimizer._optimizer_step_pre_hooks for optimizer in both)


def test_a_step_that_one_optimizer_leaves_out_is_counted_once() -> None:
    """A scaler of gradients skips the step of an optimizer whose gradients overflowed."""
    model = toy()
    first, second = (SGD(part, lr=0.05) for part in parts(model))
    reg = Regularizer(model, toy_plan(), beta=1e-2).attach([first, second])
    for batch in batches(6):
        loss_of(model, batch).backward()
        second.step()
        if reg.steps_done % 2:
            first.step()
    assert reg.steps_done == 6


def test_muon_and_adamw_drive_units_to_zero_and_prune() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    x, y = torch.randn(32, 16), torch.arange(32) % 4
    matrices, rest = parts(model)
    optimizers: list[Optimizer] = [torch.optim.Muon(matrices, lr=1e-3), AdamW(rest, lr=1e-3)]
    plan, budget = etp.trace(model, x[:1]), etp.Budget(speed_up=2)
    force = etp.methods.get("etp").regularizer(model, plan, budget=budget, steps=20)
    assert force is not None
    with force.attach(optimizers):
        for _ in range(20):
            nn.functional.cross_entropy(model(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    scores = etp.criteria.magnitude(model, plan, normalize="none")
    selection = etp.allocate(model, plan, scores, budget=budget)
    before = model(x)
    etp.prune_(model, plan, selection, optimizer=optimizers)
    torch.testing.assert_close(model(x), before)
    nn.functional.cross_entropy(model(x), y).backward()
    for optimizer in optimizers:
        optimizer.step()


class ScheduleFree(Optimizer):
    """SGD without a schedule (Defazio et al. 2024), as the package schedulefree writes it."""

    def __init__(self, parameters: Any, lr: float = 0.05, beta: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta, "train_mode": True, "k": 0})

    @torch.no_grad()
    def eval(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.lerp_(self.state[p]["z"], 1 - 1 / group["beta"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, 1 / group["k"])
                p.sub_(p.grad, alpha=group["lr"] * (1 - group["beta"] * (1 - 1 / group["k"])))
                z.sub_(p.grad, alpha=group["lr"])


def test_weights_of_a_schedule_free_optimizer_carry_the_zeros() -> None:
    model = toy()
    optimizer = ScheduleFree(model.parameters())
    reg = Regularizer(model, toy_plan(), **SETTINGS["steered"]).attach(optimizer)
    train(model, optimizer, batches(10))
    reg.detach()
    zero = etp.criteria.magnitude(model, toy_plan(), normalize="none") == 0
    assert int(zero.sum()) >= 2
    optimizer.eval()
    assert torch.equal(etp.criteria.magnitude(model, toy_plan(), normalize="none") == 0, zero)


def test_compress_takes_several_optimizers() -> None:
    def train_both(model: nn.Module, phase: etp.Phase) -> None:
        both: list[Optimizer] = [SGD(part, lr=0.05) for part in parts(model)]
        phase.attach(both, steps=4)
        for x, y in batches(4, torch.float32):
            phase.labels(y)
            nn.functional.cross_entropy(model(x), y).backward()
            for optimizer in both:
                optimizer.step()
                optimizer.zero_grad()

    for method in ("etp", "greg2", "sfp", "taylor"):
        torch.manual_seed(0)
        model = Toy()
        result = etp.compress(
            model, batches(1, torch.float32)[0][0][:1], train=train_both, evaluate=lambda m: 0.0, speed_up=1.5,
            method=method, progress=False,
        )  # fmt: skip
        assert result.rounds[-1].cost.macs < result.dense.macs


def test_what_no_optimizer_holds_is_refused() -> None:
    model = toy()
    matrices, rest = parts(model)
    reg = Regularizer(model, toy_plan())
    with pytest.raises(ForceError, match=r"do not hold 'norm\.bias'"):
        reg.attach([SGD(matrices, lr=0.1), SGD(rest[:1], lr=0.1)])
    with pytest.raises(ForceError, match="no optimizer"):
        reg.attach([])
    with pytest.raises(ForceError, match="not str"):
        reg.attach([SGD(matrices, lr=0.1), "sgd"])  # type: ignore[list-item]
    with pytest.raises(ForceError, match="not int"):
        reg.attach(3)  # type: ignore[arg-type]


def test_attach_warns_of_states_that_surgery_refuses() -> None:
    model = toy()
    reg = Regularizer(model, toy_plan())
    with pytest.warns(UserWarning, match="LBFGS keeps state .* on_uncuttable='reset'"):
        reg.attach(torch.optim.LBFGS(model.parameters()))
    reg.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reg.attach(torch.optim.LBFGS(model.parameters()), rehearse_surgery=False).detach()
        for make in (SGD, AdamW, torch.optim.Adafactor, torch.optim.RMSprop):
            generator = torch.get_rng_state()
            optimizer = make(model.parameters(), lr=0.1)
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            reg.attach(optimizer).detach()
            assert not optimizer.state and torch.equal(generator, torch.get_rng_state())
            assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


JUNK: tuple[Any, ...] = (
    None, True, -1, 10**30, 0.5, float("nan"), "", "x" * 50, [], [[]], [1, "a"], {}, {"a": 1}, torch.zeros(()),
    torch.zeros(3), torch.full((19,), torch.nan), torch.full((19,), 7.0), torch.zeros(19, dtype=torch.int64),
    torch.zeros(19, device="meta"), torch.zeros(19).to_sparse(), torch.zeros(19, dtype=torch.complex64), b"x",
)  # fmt: skip


@pytest.mark.parametrize("name", ["prox", "steered"])
def test_damaged_states_are_one_error_and_change_nothing(name: str) -> None:
    kappa = {"kappa": "mean"} if name == "steered" else {}
    reg = Regularizer(toy(), toy_plan(), **SETTINGS[name], **kappa)
    sound, source = reg.state_dict(), random.Random(0)
    for key in [*sound, "more"]:
        for value in JUNK:
            state = {**sound, key: value}
            if source.random() < 0.3:
                state.pop(source.choice(list(sound)))
            before = str(reg.state_dict())
            try:
                reg.load_state_dict(state)
            except (ForceError, PlanError) as error:
                said = str(error)
            else:
                said, before = "", str(sound)
                reg.load_state_dict(sound)
            assert len(said) < 1000
            assert str(reg.state_dict()) == before
    for state in (None, [], "state", 3):
        with pytest.raises(ForceError):
            reg.load_state_dict(state)  # type: ignore[arg-type]
