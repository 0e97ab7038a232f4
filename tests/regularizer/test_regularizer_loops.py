"""The regularizer in training loops of every kind: accumulation, scaling, closures, resuming, detaching."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from etp_graph import schedules
from etp_graph.regularizer import Regularizer
from tests.support.forced_toy import (
    MODES,
    batches,
    loss_of,
    same,
    toy,
    train,
)
from tests.support.models.toy import Toy, toy_plan


@pytest.mark.parametrize("mode", MODES)
def test_gradient_accumulation_acts_once_per_step(mode: Any) -> None:
    def run(parts: int) -> Toy:
        model, plan = toy(), toy_plan()
        model.norm.eval()
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        reg = Regularizer(model, plan, beta=1e-2, mode=mode)
        with reg.attach(optimizer):
            for x, y in batches(4):
                optimizer.zero_grad()
                for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    loss = loss_of(model, (a, b)) + (reg.penalty() if mode == "loss" else 0)
                    (loss / parts).backward()
                optimizer.step()
        return model

    for a, b in zip(run(1).parameters(), run(4).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["prox", "gradient"])
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_changes_nothing_and_a_skipped_step_feels_no_force(mode: Any, fused: bool) -> None:
    def run(scale: float | None, spoil: bool) -> tuple[Toy, Toy]:
        model, plan = toy(torch.float32), toy_plan()
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        with Regularizer(model, plan, beta=1e-2, mode=mode).attach(optimizer):
            for batch in batches(3, torch.float32):
                optimizer.zero_grad()
                scaler.scale(loss_of(model, batch)).backward()
                scaler.step(optimizer)
                scaler.update()
            before = copy.deepcopy(model)
            if spoil:
                optimizer.zero_grad()
                scaler.scale(loss_of(model, batches(1, torch.float32)[0])).backward()
                assert model.linear.bias.grad is not None
                model.linear.bias.grad[0] = torch.inf
                scaler.step(optimizer)
        return before, model

    plain, _ = run(None, False)
    scaled, after = run(1024.0, True)
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(scaled.parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["prox", "gradient"])
def test_a_closure_gives_the_same_as_a_plain_loop(mode: Any) -> None:
    models = [toy(), toy()]
    for model, by_closure in zip(models, (False, True), strict=True):
        optimizer = SGD(model.parameters(), lr=0.05)
        with Regularizer(model, toy_plan(), beta=1e-2, mode=mode).attach(optimizer):
            for batch in batches(3):

                def closure(model: Toy = model, optimizer: Optimizer = optimizer, batch: Any = batch) -> float:
                    optimizer.zero_grad()
                    loss = loss_of(model, batch)
                    loss.backward()
                    return float(loss.detach())

                if by_closure:
                    assert optimizer.step(closure) > 0
                else:
                    closure()
                    optimizer.step()
    assert same(*models)


@pytest.mark.parametrize("mode", ["prox", "gradient"])
@pytest.mark.parametrize("order", ["index", "random", "importance"])
def test_a_state_continues_identically(mode: Any, order: Any) -> None:
    def make(model: Toy) -> tuple[Regularizer, Optimizer]:
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        reg = Regularizer(model, toy_plan(), beta=1e-2, mode=mode, order=order, every=3, seed=5,
                          refresh_every=4 * (order == "importance"), schedule=schedules.cubic(), steps=10)  # fmt: skip
        return reg, optimizer

    model = toy()
    reg, optimizer = make(model)
    reg.attach(optimizer)
    train(model, optimizer, batches(9)[:4])
    other = copy.deepcopy(model)
    reg2, optimizer2 = make(other)
    optimizer2.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    reg2.load_state_dict(copy.deepcopy(reg.state_dict()))
    reg2.attach(optimizer2)
    train(model, optimizer, batches(9)[4:])
    train(other, optimizer2, batches(9)[4:])
    assert same(model, other)
    assert torch.equal(reg.distances(), reg2.distances())
    json.dumps({k: v.tolist() if isinstance(v, Tensor) else v for k, v in reg.state_dict().items()})


@pytest.mark.parametrize("mode", MODES)
def test_detach_leaves_a_plain_optimizer(mode: Any) -> None:
    models = [toy(), toy()]
    optimizers = [SGD(m.parameters(), lr=0.05, momentum=0.9) for m in models]
    reg = Regularizer(models[0], toy_plan(), beta=1.0, mode=mode).attach(optimizers[0])
    reg.detach()
    reg.detach()
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, batches(3))
    assert same(*models)
    assert not optimizers[0]._optimizer_step_pre_hooks
    assert not optimizers[0]._optimizer_step_post_hooks
    assert reg.steps_done == 0


def test_leaving_the_context_detaches_after_an_error_too() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    reg = Regularizer(model, toy_plan())
    with pytest.raises(KeyError), reg.attach(optimizer):
        raise KeyError
    reg.attach(optimizer)


def test_beta_zero_is_plain_training() -> None:
    for mode in ("prox", "gradient"):
        models = [toy(), toy()]
        for model in models:
            optimizer = SGD(model.parameters(), lr=0.05)
            if model is models[0]:
                Regularizer(model, toy_plan(), beta=0, mode=mode).attach(optimizer)  # type: ignore[arg-type]
            train(model, optimizer, batches(3))
        assert same(*models)
