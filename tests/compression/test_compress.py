"""The whole pipeline: budgets are met, metrics are those that were measured, bad input changes nothing."""

from __future__ import annotations

import copy
import io
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from etp_graph import Budget, cost, forces, methods, schedules, trace
from etp_graph.compression import CompressResult, Phase
from etp_graph.demo.zoo.models import SmallResNet
from etp_graph.errors import EtpError, ForceError
from etp_graph.plan import CostModel
from etp_graph.surgery import get_record
from etp_graph.units import Units
from tests.support.models.toy import toy_plan
from tests.support.training_loops import STEPS, Loop, X, images, loss, run, toy


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_meets_the_budget_on_a_residual_network(name: str) -> None:
    torch.manual_seed(0)
    model, loop = SmallResNet(widths=(16, 24, 32), blocks=1), images()
    objects = {key: id(p) for key, p in model.named_parameters()}
    result = run(model, loop, speed_up=3, method=name)
    assert 3 <= result.speed_up <= 3.03
    after = trace(model, loop.x[:1], check=False)
    assert (result.pruned.macs, result.pruned.params) == (CostModel(after).dense.macs, CostModel(after).dense.params)
    assert {key: id(p) for key, p in model.named_parameters()} == objects
    assert loop.metrics[-1] == result.metric_finetuned
    assert (result.metric_sparse is None) == (not methods.get(name).sparse)


@pytest.mark.parametrize("name", sorted(methods.METHODS.keys() - {"network-slimming"}))
def test_every_method_comes_as_near_as_a_toy_allows(name: str) -> None:
    model, plan = toy(), toy_plan()
    without_floors = replace(methods.get(name), min_units=None, max_ratio=None)
    result = run(model, method=without_floors, speed_up=3, plan=plan)
    target = int(result.dense.macs / 3)
    sizes = [(576 * 3 * a + 576 * a * b + 4 * b * 5) for a in range(1, 9) for b in range(1, 7)]
    assert result.pruned.macs >= min(max(s for s in sizes if s <= target), 0.99 * target)
    assert result.pruned.macs <= target


def test_macs_and_params_are_budgets_too() -> None:
    dense = cost(toy(), toy_plan())
    assert run(toy(), macs=dense.macs // 2).pruned.macs <= dense.macs // 2
    assert run(toy(), params=dense.params // 2).pruned.params <= dense.params // 2
    floor = Budget(speed_up=2, min_units=3)
    result = run(toy(), budget=floor)
    assert replace(result.budget, scope=None, rank=None) == floor
    assert all(int(keep.sum()) >= 3 for keep in result.selections[0].keep.values())


def test_the_method_says_how_scores_are_compared_where_the_budget_does_not() -> None:
    method = replace(methods.get("l1"), scope="local", rank="score_per_mac")
    for target in ({"speed_up": 2}, {"budget": Budget(speed_up=2)}):
        assert run(toy(), method=method, **target).budget == Budget(speed_up=2, scope="local", rank="score_per_mac")
    asked = Budget(speed_up=2, scope="global", rank="score")
    assert run(toy(), method=method, budget=asked).budget == asked
    steered = replace(methods.get("etp"), rank="score_per_mac")
    assert steered.settings(steps=3, budget=Budget(speed_up=2)).budget == steered.with_rules(Budget(speed_up=2))


def test_metrics_and_phases_are_kept_in_their_order() -> None:
    loop = Loop()
    result = run(toy(), loop)
    assert loop.metrics == [
        result.metric_dense, result.metric_sparse, result.metric_pruned, result.metric_finetuned,
    ]  # fmt: skip
    assert [(p.name, p.round, p.rounds) for p in loop.phases] == [("sparse", 0, 1), ("finetune", 0, 1)]
    assert result.seconds.keys() == {"sparse", "prune", "finetune", "evaluate"}
    assert result.dense.macs / result.pruned.macs == result.speed_up
    assert result.selections[0].n_removed > 0


def test_pruning_zero_units_changes_no_metric() -> None:
    strong = replace(methods.get("etp"), force=forces.Heaviside(epsilon=1e4, threshold=0.3), order="index")
    result = run(toy(), method=strong, speed_up=1.5)
    assert result.metric_pruned == pytest.approx(result.metric_sparse, rel=1e-5)


def test_the_force_ends_with_its_phase() -> None:
    loop = Loop()
    model = toy()
    run(model, loop)
    sparse = loop.phases[0]
    assert sparse.regularizer is not None
    assert sparse.regularizer.steps_done == STEPS
    assert not loop.optimizers[0]._optimizer_step_post_hooks
    with pytest.raises(ForceError, match="over"):
        sparse.attach(torch.optim.SGD(model.parameters(), lr=0.1))


def test_modules_keep_their_modes() -> None:
    model = toy().train()
    model.norm.eval()
    run(model)
    assert (model.training, model.norm.training) == (True, False)


@pytest.mark.parametrize(
    ("arguments", "shares"),
    [
        ({"schedule": schedules.iterative(3)}, [1 / 3, 2 / 3, 1]),
        ({"schedule": schedules.cubic(), "rounds": 2}, [7 / 8, 1]),
        ({"method": replace(methods.get("l1"), rounds=2, schedule=schedules.warm_up(1.0))}, [1 / 2, 1]),
    ],
)
def test_rounds_climb_to_the_budget(arguments: dict[str, object], shares: list[float]) -> None:
    torch.manual_seed(0)
    loop = images()
    result = run(SmallResNet(widths=(16, 24, 32), blocks=1), loop, speed_up=4, **arguments)
    dense, target = result.dense.macs, result.dense.macs / 4
    goals = [dense - share * (dense - target) for share in shares]
    assert len(result.rounds) == len(goals)
    for one, goal in zip(result.rounds, goals, strict=True):
        assert 0.98 * goal <= one.cost.macs <= goal + 1
    for one, other in pairwise(result.rounds):
        assert one.fingerprint != other.fingerprint
    assert [p.round for p in loop.phases if p.name == "finetune"] == list(range(len(goals)))


def test_what_is_locked_stays_locked_in_every_round() -> None:
    model = toy()
    plan = trace(model, X[:1]).lock({"conv2": "kept for a reason of my own"})
    result = run(model, plan=plan, rounds=2, speed_up=2)
    assert model.conv2.out_channels == 6
    assert len(result.rounds) == 2
    model = toy()
    run(model, ignore="conv1", rounds=2, speed_up=1.5)
    assert model.conv1.out_channels == 8


def test_a_second_optimizer_or_a_late_one_is_told_so() -> None:
    def train(model: nn.Module, phase: Phase) -> None:
        phase.attach(torch.optim.SGD(model.parameters(), lr=0.1), steps=1)
        phase.attach(torch.optim.SGD(model.parameters(), lr=0.1), steps=1)

    with pytest.raises(ForceError, match="already"):
        run(toy(), train=train)


def test_result_is_a_table_and_goes_through_json() -> None:
    result = run(toy(), rounds=2, speed_up=2.5)
    again = CompressResult.from_json(result.to_json())
    assert again.to_json() == result.to_json()
    assert str(again) == str(result)
    assert all(
        torch.equal(a, b.keep[name])
        for one, b in zip(result.selections, again.selections, strict=True) for name, a in one.keep.items()
    )  # fmt: skip
    title, *table = str(result).splitlines()
    assert "speed_up=2.5" in title
    assert [line.split()[0] for line in table] == ["stage", "dense", *["sparse", "pruned", "finetuned"] * 2]
    assert len({len(line) for line in table}) == 1
    assert f"{result.metric_finetuned:.4f}" in table[-1]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "method": {"name": "x"}}'])
def test_other_text_is_no_result(text: str) -> None:
    with pytest.raises(EtpError):
        CompressResult.from_json(text)


def test_nothing_is_printed_where_no_terminal_is() -> None:
    with redirect_stdout(io.StringIO()) as out:
        run(toy())
        run(toy(), progress=False)
    assert out.getvalue() == ""


def test_the_strength_follows_its_schedule() -> None:
    method = replace(methods.get("etp"), strength=schedules.warm_up(1.0), beta=3e-4, acts_on="units")
    with pytest.raises(ForceError, match="steps="):
        run(toy(), method=method, train=lambda m, phase: phase.attach(torch.optim.SGD(m.parameters(), lr=0.1)))
    seen: list[float] = []

    def train(model: nn.Module, phase: Phase) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        regularizer = phase.attach(optimizer, steps=4)
        for _ in range(4):
            loss(model).backward()
            seen.extend([] if regularizer is None else [regularizer.strength])
            optimizer.step()

    run(toy(), method=method, train=train)
    assert seen == pytest.approx([0, method.beta / 4, method.beta / 2, method.beta * 3 / 4])


def test_the_penalty_is_there_for_the_mode_loss() -> None:
    method = replace(methods.get("etp"), mode="loss", beta=1.0, acts_on="units")

    def norms(model: nn.Module) -> float:
        plan = trace(model, X[:1], check=False)
        return Units(model, plan).square_norms(model).sum().item()

    seen: list[float] = []

    def train(model: nn.Module, phase: Phase) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
        regularizer = phase.attach(optimizer)
        for _ in range(2 if regularizer else 0):
            seen.append(norms(model))
            regularizer.penalty().backward()
            optimizer.step()
            optimizer.zero_grad()

    run(toy(), method=method, train=train)
    assert seen[1] < seen[0]


def test_a_pruned_model_can_be_compressed_once_more() -> None:
    model = toy()
    run(model)
    copied = copy.deepcopy(model)
    result = run(copied, speed_up=1.5, method="l1")
    assert result.dense.macs == cost(model, trace(model, X[:1])).macs
    assert len(get_record(copied).selections) == 2


def test_a_terminal_shows_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes any output for a terminal
    with redirect_stdout(io.StringIO()) as out:
        run(toy(), rounds=2)
    assert all(step in out.getvalue() for step in ("sparse 1/2", "finetune 2/2", "prune 2/2", "100 %"))
    with redirect_stdout(io.StringIO()) as out:
        run(toy(), rounds=2, progress=False)
    assert out.getvalue() == ""
