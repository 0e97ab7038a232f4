"""Recurrent layers: what can be pruned in small models around them, that it is exact, what it costs, what locks it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import etp_graph as etp
from etp_graph.verification._sampling import random_selection, randomize_
from tests.support.models.constructs import Net
from tests.support.models.recurrent_models import (
    CASES,
    LANGUAGE,
    LENGTHS,
    LOCKED,
    OPTIONS,
    TEXT,
    WORDS,
    E,
    H,
    V,
    language_model,
    parts,
)
from tests.support.zero_units import zero_units_


def prunable(plan: etp.Plan) -> list[tuple[str, int, int]]:
    return sorted((group.kind, group.n_units, group.blocks) for group in plan.prunable)


def some(plan: etp.Plan, seed: int = 0) -> etp.Selection:
    return random_selection(plan, plan.prunable, 0.4, torch.Generator().manual_seed(seed))


def prove(build: Callable[[], nn.Module], groups: list[tuple[str, int, int]], folder: Path) -> None:
    """The groups are these, they are exact, and a pruned model comes back from disk as it was."""
    torch.manual_seed(0)
    model = build()
    plan = etp.trace(model, TEXT, check=False)
    assert prunable(plan) == sorted(groups)
    assert etp.trace(model, TEXT).fingerprint == plan.fingerprint, "the check has locked something"
    found = etp.verify(model, plan, TEXT)
    assert found.error < 1e-10 and found.effect > 1e-3
    assert found.gradient_error is not None and found.gradient_error < 1e-6
    predicted = etp.cost(model, plan, some(plan))
    objects = {name: id(p) for name, p in model.named_parameters()}
    etp.prune_(model, plan, some(plan))
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    assert etp.cost(model, etp.trace(model, TEXT)) == predicted
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            named = [getattr(module, name) for name in module._flat_weights_names]
            assert all(a is b for a, b in zip(module._flat_weights, named, strict=True))
            module.flatten_parameters()
            assert module.weight_ih_l0.shape[0] == module.weight_hh_l0.shape[0] == gates(module) * module.hidden_size
            assert module.weight_ih_l0.shape[1] == module.input_size
    etp.save(model, folder)
    assert torch.equal(etp.load(folder, build=build).eval()(TEXT), model.eval()(TEXT))


def gates(layer: nn.RNNBase) -> int:
    return {"LSTM": 4, "GRU": 3}.get(layer.mode, 1)


@pytest.mark.parametrize(("kind", "option"), LANGUAGE)
def test_language_models(kind: str, option: str, tmp_path: Path) -> None:
    given = OPTIONS[option]
    runs = given.get("num_layers", 1) * (1 + given.get("bidirectional", False))
    groups = [WORDS, ("hidden", runs * H, runs)]
    if "proj_size" in given:
        groups.append(("projections", runs * given["proj_size"], runs))
    prove(lambda: language_model(kind, option), groups, tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_what_is_made_of_outputs_and_states(name: str, tmp_path: Path) -> None:
    prove(CASES[name].net, list(CASES[name].groups), tmp_path)


@pytest.mark.parametrize("name", LOCKED)
def test_locked_units(name: str) -> None:
    torch.manual_seed(0)
    build, reason = LOCKED[name]
    net = build()
    net.extra = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    inner = net.run
    net.run = lambda n, text: (inner(n, text), n.extra(torch.ones(1, 6, dtype=n.extra[0].weight.dtype)))
    plan = etp.trace(net, TEXT, check=False)
    assert "hidden" not in {group.kind for group in plan.prunable}
    assert reason is None or reason in str([g.locked for g in plan.groups if g.kind == "hidden"])
    etp.verify(net, plan, TEXT)


def test_a_state_among_the_example_inputs_is_fixed() -> None:
    net = Net(lambda n, text, h, c: n.out(n.rnn(n.embed(text), (h, c))[0]), **parts(nn.LSTM(E, H, 2)))
    plan = etp.trace(net, (TEXT, torch.zeros(2, 4, H), torch.zeros(2, 4, H)))
    assert {group.kind for group in plan.prunable} == {"features"}
    assert "initial state of 'rnn' has a fixed size" in str(plan["rnn"].locked)


@pytest.mark.parametrize(("kind", "option"), LANGUAGE)
def test_cost_by_hand(kind: str, option: str) -> None:
    model = language_model(kind, option)
    plan = etp.trace(model, TEXT, check=False)
    for seed in range(3):
        selection = some(plan, seed)
        found = etp.cost(model, plan, selection)
        given, keep = OPTIONS[option], {group.kind: selection.keep.get(group.name) for group in plan.groups}
        directions = 1 + given.get("bidirectional", False)
        runs = given.get("num_layers", 1) * directions
        words, hidden = int(keep["features"].sum()), int(keep["hidden"].sum()) // runs
        projected = int(keep["projections"].sum()) // runs if "proj_size" in given else 0
        out, rows = projected or hidden, gates(model.rnn) * hidden
        macs, params = 0, V * words
        for layer in range(given.get("num_layers", 1)):
            into = words if layer == 0 else directions * out
            weights = directions * (rows * into + rows * out + projected * hidden)
            macs += TEXT.numel() * weights
            params += weights + directions * 2 * rows * given.get("bias", True)
        assert found.macs == macs + TEXT.numel() * directions * out * V
        assert found.params == params + V * directions * out + V


def test_packed_steps_are_counted_as_they_run() -> None:
    model = CASES["packed"].net()
    steps, rows = int(LENGTHS.sum()), 4 * H
    first, second = 2 * rows * (E + H), 2 * rows * (2 * H + H)
    assert etp.cost(model, etp.trace(model, TEXT, check=False)).macs == steps * (first + second) + 4 * 2 * H * 3


@pytest.mark.parametrize(("kind", "option"), LANGUAGE)
def test_units_of_zeros_go_for_free(kind: str, option: str) -> None:
    torch.manual_seed(1)
    model = language_model(kind, option).double()
    randomize_(model)
    plan = etp.trace(model, TEXT, check=False)
    selection = some(plan)
    zero_units_(model, plan, selection.flat(plan))
    before = model.eval()(TEXT)
    norms = etp.criteria.magnitude(model, plan)
    etp.prune_(model, plan, selection)
    torch.testing.assert_close(model(TEXT), before, rtol=1e-12, atol=1e-12)
    assert bool((norms[~selection.flat(plan)] == 0).all())


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(TEXT).flatten(0, 1), TEXT.flatten()).backward()
    optimizer.step()


def test_the_force_drives_units_to_zero_and_a_budget_takes_them() -> None:
    torch.manual_seed(2)
    model = language_model("lstm", "two layers both ways")
    plan = etp.trace(model, TEXT, ignore="embed")
    regularizer = etp.Regularizer(model, plan, beta=0.02, mode="prox")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer.attach(optimizer)
    for _ in range(8):
        train_step(model, optimizer)
    scores = etp.criteria.magnitude(model, plan)
    (span,) = (span for group, span in plan.spans() if group.kind == "hidden")
    dead = int((scores[span] == 0).view(4, H).sum(1).min())
    assert 0 < dead < H
    keep = torch.ones(plan.n_units, dtype=torch.bool)
    keep[span] = (
        torch.ones(4, H, dtype=torch.bool).scatter(1, scores[span].view(4, H).argsort(1)[:, :dead], False).view(-1)
    )
    target = etp.cost(model, plan, etp.Selection.from_flat(plan, keep)).macs
    selection = etp.allocate(model, plan, scores, budget=etp.Budget(macs=target))
    before = model.eval()(TEXT)
    etp.prune_(model, plan, selection, optimizer=optimizer)
    torch.testing.assert_close(model(TEXT), before, rtol=1e-5, atol=1e-6)
    assert model.rnn.hidden_size == H - dead


def test_three_rounds_with_one_optimizer() -> None:
    torch.manual_seed(3)
    model = language_model("lstm", "two layers both ways projected")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        for _ in range(2):
            train_step(model, optimizer)
        plan = etp.trace(model, TEXT)
        scores = etp.criteria.magnitude(model, plan)
        selection = etp.allocate(model, plan, scores, budget=etp.Budget(speed_up=1.3))
        etp.prune_(model, plan, selection, optimizer=optimizer)
        assert model.rnn.proj_size < model.rnn.hidden_size
    assert model.rnn.weight_ih_l0.grad.shape == model.rnn.weight_ih_l0.shape


def test_an_ignored_layer_keeps_its_units() -> None:
    plan = etp.trace(language_model("lstm", "two layers"), TEXT, ignore="rnn")
    assert {group.kind for group in plan.prunable} == {"features"}
    assert "hidden" in str(plan) and "equal in 2 blocks" in str(plan)
