"""The regularizer against its equations written out as loops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from etp_graph import forces, schedules
from etp_graph.regularizer import Regularizer
from tests.support.forced_toy import (
    MODES,
    batches,
    equation_of_force,
    norms_of,
    numbers_of,
    positions,
    same,
    shrink_by_the_equation,
    sums_of,
    toy,
    train,
)
from tests.support.models.toy import Toy, toy_plan

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.05),
    "momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "dampening": lambda p: SGD(p, lr=0.05, momentum=0.8, dampening=0.5),
    "Nesterov": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: RMSprop(p, lr=1e-3, momentum=0.5),
    "Adam": lambda p: Adam(p, lr=1e-3),
    "AdamW": lambda p: AdamW(p, lr=1e-3, weight_decay=0.1),
}
STEP_SIZES = {
    "SGD": 0.05,
    "momentum": 0.5,
    "dampening": 0.125,
    "Nesterov": 0.5,
    "RMSprop": 2e-3,
    "Adam": 1e-3,
    "AdamW": 1e-3,
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_force = pytest.mark.parametrize("force", [f() for f in forces.FORCES.values()], ids=lambda f: f.name)


@pytest.mark.parametrize(
    ("name", "force"),
    [
        *((name, forces.exponential()) for name in OPTIMIZERS),
        *(("momentum", f()) for f in forces.FORCES.values() if not f.elementwise),
    ],
)
@pytest.mark.parametrize("beta", [1e-4, 3e-2])
def test_prox_is_the_plain_step_and_then_the_equation(name: str, force: forces.Force, beta: float) -> None:
    plan, fast = toy_plan(), toy()
    slow = copy.deepcopy(fast)
    eta = dict.fromkeys(dict(slow.named_parameters()), STEP_SIZES[name])
    plain, forced = OPTIMIZERS[name](slow.parameters()), OPTIMIZERS[name](fast.parameters())
    with Regularizer(fast, plan, force=force, beta=beta).attach(forced):
        for batch in batches(4):
            train(fast, forced, [batch])
            train(slow, plain, [batch])
            shrink_by_the_equation(slow, plan, force, beta, eta)
    for a, b in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_each_slice_follows_the_learning_rate_of_its_own_group_and_of_the_moment() -> None:
    plan, fast = toy_plan(), toy()
    slow = copy.deepcopy(fast)

    def split(model: Toy) -> SGD:
        convs = [model.conv1.weight, *model.conv2.parameters()]
        rest = [*model.norm.parameters(), *model.linear.parameters()]
        return SGD([{"params": convs, "lr": 0.1}, {"params": rest, "lr": 0.02, "momentum": 0.5}], lr=1.0)

    plain, forced = split(slow), split(fast)
    decays = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (plain, forced)]
    with Regularizer(fast, plan, beta=1e-2).attach(forced):
        for step, batch in enumerate(batches(5)):
            train(fast, forced, [batch])
            train(slow, plain, [batch])
            eta = {n: 0.5**step * (0.1 if n.startswith("conv") else 0.04) for n, _ in slow.named_parameters()}
            shrink_by_the_equation(slow, plan, forces.exponential(), 1e-2, eta)
            for decay in decays:
                decay.step()
    for a, b in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@every_optimizer
def test_units_at_zero_are_zero_in_every_slice_and_removing_them_changes_nothing(name: str) -> None:
    model, plan = toy(torch.float32), toy_plan()
    optimizer = OPTIMIZERS[name](model.parameters())
    beta = 0.02 if STEP_SIZES[name] > 0.01 else 0.5
    with Regularizer(model, plan, beta=beta).attach(optimizer):
        train(model, optimizer, batches(60, torch.float32))
    gone = norms_of(model, plan)[:14] == 0
    assert int(gone[:8].sum()) >= 1
    at = positions(model, plan)
    for u, tensor, axis, i in at:
        if gone[u]:
            assert bool((model.get_parameter(tensor).select(axis, i) == 0).all())
    x = batches(1, torch.float32)[0][0]
    for mode in (True, False):
        model.train(mode)
        with torch.no_grad():
            before = model(x)
            kept = (~gone[:8]).double().float().view(1, -1, 1, 1)
            model.norm.register_forward_hook(lambda m, i, o, kept=kept: o * kept)
            torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)


@every_force
def test_penalty_is_the_equation_and_the_mode_gradient_adds_its_slope(force: forces.Force) -> None:
    model, plan, beta = toy(), toy_plan(), 0.1
    reg = Regularizer(model, plan, force=force, beta=beta, mode="gradient")
    norms, kappa = norms_of(model, plan), numbers_of(model, plan).sqrt()
    acts = equation_of_force(force, model, plan)
    plain = sums_of(model, plan) if force.elementwise else kappa * norms
    wanted = beta * (acts * (norms**2 / 2 if force.squared else plain)).sum()
    torch.testing.assert_close(reg.penalty().detach(), wanted)
    names, weights = zip(*model.named_parameters(), strict=True)
    slopes = dict(zip(names, torch.autograd.grad(reg.penalty(), weights, allow_unused=True), strict=True))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = SGD(model.parameters(), lr=1.0)
    with reg.attach(optimizer):
        optimizer.step()  # no loss: all that moves the weights is the force
    for n, p in model.named_parameters():
        slope = slopes[n] if slopes[n] is not None else torch.zeros_like(p)
        torch.testing.assert_close(before[n] - p.detach(), slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("force", [forces.exponential(), forces.uniform(), forces.growing()], ids=lambda f: f.name)
def test_the_modes_agree_to_first_order(force: forces.Force) -> None:
    def after(mode: Any, beta: float) -> Tensor:
        model, plan = toy(), toy_plan()
        optimizer = SGD(model.parameters(), lr=0.05)
        reg = Regularizer(model, plan, force=force, beta=beta, mode=mode)
        with reg.attach(optimizer):
            train(model, optimizer, batches(3), reg.penalty if mode == "loss" else None)
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    apart = {}
    for beta in (1e-5, 1e-6):
        found = {mode: after(mode, beta) for mode in MODES}
        torch.testing.assert_close(found["gradient"], found["loss"], rtol=1e-10, atol=1e-13)
        moved = (found["loss"] - after("loss", 0.0)).norm()
        apart[beta] = float((found["prox"] - found["loss"]).norm() / moved)
        assert moved > 0
    assert apart[1e-5] < 0.1  # what is left is of the order of the learning rate: the force acts after the step
    assert apart[1e-6] < 0.1


def test_orders_rank_as_they_say() -> None:
    model, plan = toy(), toy_plan()
    index = Regularizer(model, plan)
    torch.testing.assert_close(index.distances()[:8], torch.arange(8, dtype=torch.float64) / 7)
    mixed = [Regularizer(model, plan, order="random", seed=s).distances() for s in (0, 0, 1)]
    assert torch.equal(mixed[0], mixed[1])
    assert not torch.equal(mixed[0], mixed[2])
    ranked = Regularizer(model, plan, order="importance").distances()
    norms = norms_of(model, plan)
    for span in (slice(0, 8), slice(8, 14)):
        assert sorted(mixed[0][span].tolist()) == sorted(index.distances()[span].tolist())
        assert (norms[span].argsort(descending=True) == ranked[span].argsort()).all()
    assert index.forces()[14:].tolist() == [0.0] * 5  # the last group is locked


def test_importance_is_ranked_anew_when_asked() -> None:
    for refresh, follows in ((0, False), (2, True)):
        model, plan = toy(), toy_plan()
        optimizer = SGD(model.parameters(), lr=0.0)
        reg = Regularizer(model, plan, order="importance", refresh_every=refresh).attach(optimizer)
        with torch.no_grad():
            model.norm.weight[5] = 100.0
        optimizer.step()
        assert reg.distances()[5] > 0
        optimizer.step()
        assert (reg.distances()[5] == 0) == follows


def test_blocks_are_ranked_separately() -> None:
    model, plan = toy(), toy_plan()
    halves = replace(plan, groups=(replace(plan.groups[0], blocks=2), *plan.groups[1:]))
    found = Regularizer(model, halves, force=forces.linear())
    assert found.forces()[:8].tolist() == pytest.approx([0, 1, 2, 3, 0, 1, 2, 3])


@pytest.mark.parametrize("mode", ["prox", "gradient"])
def test_every_saves_steps_and_applies_their_force_at_once(mode: Any) -> None:
    def run(every: int) -> tuple[list[bool], Tensor]:
        model = toy()
        optimizer = SGD(model.parameters(), lr=0.01)
        moved = []
        with Regularizer(model, toy_plan(), beta=1e-4, mode=mode, every=every).attach(optimizer):
            for _ in range(6):  # no loss: only the force moves the weights
                optimizer.zero_grad()
                before = copy.deepcopy(model)
                optimizer.step()
                moved.append(not same(before, model))
        return moved, nn.utils.parameters_to_vector(model.parameters()).detach()

    (often, a), (seldom, b) = run(1), run(3)
    assert often == [True] * 6
    assert seldom == [False, False, True] * 2
    start = nn.utils.parameters_to_vector(toy().parameters()).detach()
    torch.testing.assert_close(a - start, b - start, rtol=1e-2, atol=0)  # what is left is of second order


def test_a_schedule_drives_the_strength() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.0)
    reg = Regularizer(model, toy_plan(), beta=2.0, schedule=schedules.warm_up(end=0.5), steps=4).attach(optimizer)
    found = []
    for _ in range(6):
        found.append(reg.strength)
        optimizer.step()
    assert found == [0, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_force_below_the_rounding_of_the_weights_is_not_lost(dtype: torch.dtype) -> None:
    """Many steps of a force that is far below one rounding step shrink low-precision weights as they do doubles."""
    steps, beta = 400, {torch.bfloat16: 1e-3, torch.float16: 1e-4, torch.float32: 2e-8}[dtype]
    exact, coarse = toy(), toy().to(dtype)
    for a, b in zip(exact.parameters(), coarse.parameters(), strict=True):
        a.data.copy_(b.data)
    start = norms_of(exact, toy_plan())[:14]
    for model in (exact, coarse):
        optimizer = SGD(model.parameters(), lr=0.1)
        with Regularizer(model, toy_plan(), force=forces.uniform(), beta=beta).attach(optimizer):
            for _ in range(steps):
                optimizer.step()
    lost = start - norms_of(exact, toy_plan())[:14]
    lost_coarse = start - norms_of(coarse, toy_plan())[:14]
    assert bool((lost > 0).all())
    torch.testing.assert_close(lost_coarse, lost, rtol=0.2, atol=0)


def test_units_at_zero_give_no_nan_and_no_slope() -> None:
    model, plan = toy(), toy_plan()
    for _, name, axis, i in (p for p in positions(model, plan) if p[0] == 3):
        model.get_parameter(name).data.select(axis, i).zero_()
    for mode in ("prox", "gradient"):
        reg = Regularizer(model, plan, beta=0.1, mode=mode)  # type: ignore[arg-type]
        reg.penalty().backward()
        optimizer = SGD(
            [
                {"params": model.conv1.parameters(), "lr": 0.0},
                {"params": [p for n, p in model.named_parameters() if "conv1" not in n]},
            ],
            lr=0.1,
        )
        with reg.attach(optimizer):
            optimizer.step()
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
        assert model.conv1.weight.grad is not None
        assert norms_of(model, plan)[3] == 0
        model.zero_grad()
