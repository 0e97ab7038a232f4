"""GReg with the growth of its authors' code, against that code's counters written out as a loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

import etp_graph as etp
from etp_graph import methods
from etp_graph.compression._losers import PushLosers, find_losers
from tests.support.models.toy import toy_plan
from tests.support.training_loops import run, toy

INTERVAL, PRUNE, PICK, CEILING, PICKED_AT, STABILIZE = 10, 1e-4, 1e-5, 1.0, 1e-2, 10_000
"""update_reg_interval, reg_granularity_prune, _pick, reg_upper_limit, _pick, and --stabilize of the scripts."""


def growth(name: str) -> tuple[list[float], float]:
    """λ of a unit that is chosen, after each update, and the share of all iterations after which it was chosen."""
    reg, values, picked, iterations = 0.0, [0.0], 0, 0
    if name == "greg2-published":
        while reg < PICKED_AT - 1e-12:
            reg += PICK
            iterations += INTERVAL
            values.append(reg)
        picked = iterations
    while reg < CEILING - 1e-12:
        reg += PRUNE
        iterations += INTERVAL
        values.append(reg)
    total = iterations + STABILIZE
    values += [reg] * (STABILIZE // INTERVAL)
    return values, picked / total


@pytest.mark.parametrize("name", ["greg1-published", "greg2-published"])
def test_the_strength_grows_as_in_the_code(name: str) -> None:
    method = methods.get(name)
    values, picked = growth(name)
    assert method.strength is not None
    for number in range(0, len(values), 97):
        assert method.strength(number / (len(values) - 1)) == pytest.approx(values[number], abs=1e-6)
    assert method.select_at == pytest.approx(picked)
    assert method.beta == CEILING


@pytest.mark.parametrize("name", ["greg1-published", "greg2-published"])
def test_the_gradient_is_that_of_a_weight_decay_on_the_chosen_units(name: str) -> None:
    """reg · w is added to the gradient of every weight of the filters of least mean |w| of each layer."""
    model, plan, method, steps = toy(), toy_plan(), methods.get(name), 119
    optimizer = SGD(model.parameters(), lr=0.0)
    budget = method.with_rules(etp.Budget(speed_up=2))
    found = method.regularizer(model, plan, steps=steps)
    assert found is not None
    found.attach(optimizer)
    PushLosers(found, find_losers(model, plan, method, budget), at=round(method.select_at * steps)).attach(optimizer)
    for _ in range(60):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    gone = found.forces() > 0
    for layer, span in ((model.conv1, slice(0, 8)), (model.conv2, slice(8, 14))):
        means = torch.tensor([float(w.detach().abs().mean()) for w in layer.weight])
        n = int(gone[span].sum())
        assert set(means.argsort()[:n].tolist()) == set(gone[span].nonzero().flatten().tolist())
    assert method.strength is not None
    reg = method.strength(59 / steps)
    first: nn.Conv2d = model.conv1
    assert first.weight.grad is not None
    torch.testing.assert_close(first.weight.grad, reg * first.weight.detach() * gone[:8].reshape(8, 1, 1, 1))


@pytest.mark.parametrize("name", ["greg1-published", "greg2-published"])
def test_it_goes_through_compress(name: str) -> None:
    assert run(toy(), method=name, plan=toy_plan(), speed_up=2).speed_up >= 2
