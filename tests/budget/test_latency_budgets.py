"""Budgets in time: met by the clock, corrected where the tables are wrong, and never silently missed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import etp_graph as etp
from etp_graph.budget import _allocate
from etp_graph.budget._latency_fit import ITERATIONS, LatencySearch
from etp_graph.cli import app
from etp_graph.plan import LatencyFit
from etp_graph.report import page
from etp_graph.report._story import read_report_data
from tests.support.models.toy import Toy, toy_plan
from tests.support.timers import Formula, macs_of

X = torch.randn(2, 16)
CURVES: dict[str, Callable[[float], float]] = {
    "as the tables say": lambda macs: 1e-6 * macs,
    "with a constant rest": lambda macs: 1e-3 + 1e-6 * macs,
    "slower when small": lambda macs: 1e-3 * macs**0.5,
    "faster when small": lambda macs: 1e-9 * macs**2,
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 4))


def clock(monkeypatch: pytest.MonkeyPatch, timer: Any) -> Any:
    monkeypatch.setattr(_allocate, "WallClock", lambda: timer)
    return timer


def fit(model: nn.Module, budget: etp.Budget, x: Any = X) -> tuple[etp.Selection, LatencyFit]:
    plan = etp.trace(model, x, check=False)
    scores = etp.criteria.magnitude(model, plan)
    selection = etp.allocate(model, plan, scores, budget=budget, example_inputs=x)
    assert selection.latency is not None
    selection.check(plan)
    return selection, selection.latency


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("target", [1.2, 2.0, 3.0])
def test_a_target_is_met_whatever_the_tables_missed(curve: str, target: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, timer = network(), clock(monkeypatch, Formula(model_seconds=CURVES[curve]))
    dense = 1e3 * CURVES[curve](macs_of(model, X))
    for budget in (etp.Budget(speed_up_latency=target), etp.Budget(latency_ms=dense / target)):
        selection, found = fit(model, budget)
        assert found.target_ms == pytest.approx(dense / target)
        assert found.dense_ms == pytest.approx(dense)
        assert abs(found.miss) <= budget.tolerance
        assert found.measured_ms == pytest.approx(1e3 * timer.measured[-1][1])
        pruned = copy.deepcopy(model)
        etp.prune_(pruned, etp.trace(model, X, check=False), selection)
        assert found.measured_ms == pytest.approx(1e3 * CURVES[curve](macs_of(pruned, X)))
        if curve != "slower when small":
            assert found.predicted_ms == pytest.approx(found.target_ms, rel=0.1)


def test_tables_that_are_right_need_no_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, Formula(layer_seconds=lambda s: 2e-6 * s[0] * s[1], model_seconds=CURVES["as the tables say"]))
    _, found = fit(network(), etp.Budget(speed_up_latency=2))
    assert found.iterations == 1
    assert found.predicted_ms == pytest.approx(found.measured_ms, rel=0.02)


def test_a_wrong_prediction_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = clock(monkeypatch, Formula(model_seconds=CURVES["faster when small"]))
    _, found = fit(network(), etp.Budget(speed_up_latency=2, tolerance=0.03))
    assert 1 < found.iterations <= ITERATIONS
    assert len(timer.measured) == found.iterations + 1  # and the smallest model
    assert abs(found.miss) <= 0.03


def test_a_dense_model_that_is_fast_enough_keeps_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, Formula())
    selection, found = fit(network(), etp.Budget(latency_ms=1e3))
    assert selection.n_removed == 0
    assert found.iterations == 0
    assert found.measured_ms == found.dense_ms <= found.target_ms


def test_a_multiple_is_chosen_unless_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def stairs(sizes: tuple[int, ...]) -> float:
        return 1e-6 * -(-sizes[0] // 16) * 16 * sizes[1]

    model = network()
    clock(monkeypatch, Formula(layer_seconds=stairs))
    selection, found = fit(model, etp.Budget(speed_up_latency=2, tolerance=0.2))
    assert found.round_to == 16
    assert all(int(keep.sum()) % 16 == 0 for keep in selection.keep.values() if len(keep) >= 64)
    _, found = fit(model, etp.Budget(speed_up_latency=2, round_to=3))
    assert found.round_to == 3


def test_without_the_multiple_where_it_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def stairs(sizes: tuple[int, ...]) -> float:
        return 1e-6 * -(-sizes[0] // 16) * 16 * sizes[1]

    clock(monkeypatch, Formula(layer_seconds=stairs))
    _, found = fit(network(), etp.Budget(speed_up_latency=100))
    assert found.round_to == 1


def test_out_of_reach_says_what_is_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, Formula(model_seconds=lambda macs: 1e-3 + 1e-12 * macs))
    with pytest.raises(etp.BudgetError, match=r"latency_ms=0.5 is out of reach.*closest is latency_ms=1.00"):
        fit(network(), etp.Budget(latency_ms=0.5))
    with pytest.raises(etp.BudgetError, match=r"closest is speed_up_latency=1.0, .*dense model takes 1.000 ms"):
        fit(network(), etp.Budget(speed_up_latency=2))


def test_rules_that_let_nothing_go(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, Formula())
    with pytest.raises(etp.BudgetError, match=r"closest is speed_up_latency=1.0"):
        fit(network(), etp.Budget(speed_up_latency=2, max_ratio=0))


def test_a_miss_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    # All models but the smallest are as slow as the dense one.
    clock(monkeypatch, Formula(model_seconds=lambda macs: 1e-3 if macs > 100 else 1e-4))
    with pytest.warns(etp.LatencyMissed, match=r"speed_up_latency=2 was not met: target 0.500 ms"):
        _, found = fit(network(), etp.Budget(speed_up_latency=2))
    assert found.miss > 0.1


def test_nothing_of_the_model_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, Formula())
    model, x = Toy().train(), torch.randn(1, 3, 8, 8)
    plan, scores = toy_plan(), torch.rand(19)
    tensors = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    state = torch.get_rng_state()
    etp.allocate(model, plan, scores, budget=etp.Budget(speed_up_latency=2), example_inputs=x)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is tensors[name][0]
        assert torch.equal(value, tensors[name][1])
    assert all(module.training for module in model.modules())
    plan.check(model)


class Single(nn.Sequential):
    def __deepcopy__(self, memo: Any) -> Single:
        raise TypeError("there is one of me")


def test_what_cannot_be_measured() -> None:
    budget = etp.Budget(latency_ms=5)
    plan, scores = toy_plan(), torch.rand(19)
    with pytest.raises(etp.BudgetError, match=r"latency_ms=5 .*example_inputs="):
        etp.allocate(Toy(), plan, scores, budget=budget)
    with pytest.raises(etp.BudgetError, match="measured, not counted"):
        budget.target(etp.cost(Toy(), plan))
    single = Single(nn.Linear(16, 8), nn.Linear(8, 4))
    with pytest.raises(etp.BudgetError, match=r"Single cannot be copied .*one of me"):
        LatencySearch(
            single, etp.trace(single, X, check=False), torch.rand(12).double().numpy(), budget, X, lambda *_: None,  # type: ignore[arg-type,return-value]
            Formula(),
        ).run()  # fmt: skip
    meta = nn.Sequential(nn.Linear(16, 8, device="meta"), nn.Linear(8, 4, device="meta"))
    plan = etp.trace(meta, X, check=False)
    with pytest.raises(etp.BudgetError, match="meta device"):
        etp.allocate(meta, plan, torch.rand(plan.n_units), budget=budget, example_inputs=X)


def compress(model: nn.Module, **arguments: Any) -> etp.CompressResult:
    def train(model: nn.Module, phase: etp.Phase) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        phase.attach(optimizer, steps=1)
        model(X).sum().backward()
        optimizer.step()

    return etp.compress(model, X, train=train, evaluate=lambda _: 0.5, progress=False, **arguments)


def test_compress(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock(monkeypatch, Formula(model_seconds=CURVES["as the tables say"]))
    model = network()
    result = compress(model, speed_up_latency=2, method="torque", checkpoint=tmp_path)
    assert result.latency is not None
    assert abs(result.latency.miss) <= 0.1
    assert result.latency.speed_up == pytest.approx(result.speed_up, rel=1e-6)
    assert result.latency.measured_ms == pytest.approx(1e-3 * macs_of(model, X))
    assert str(result.latency) in str(result)
    assert "in MACs" in str(result)
    again = etp.CompressResult.from_json(result.to_json())
    assert again.latency == result.latency
    assert result.latency.layers
    assert all(0 < pruned <= dense for dense, pruned in result.latency.layers.values())
    story = read_report_data(tmp_path)
    assert story.latency == result.latency
    text = page(story)
    assert "Latency by layer" in text
    assert all(f">{name}</b>" in text for name in result.latency.layers)
    assert str(result.latency) in text
    assert again.asked == "speed_up_latency=2"
    old = json.loads(result.to_json())
    del old["rounds"][0]["latency"]  # as written before there were budgets in time
    assert etp.CompressResult.from_json(json.dumps(old)).latency is None


def test_the_default_method_steers_to_the_macs_of_a_model_that_takes_the_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock(monkeypatch, Formula(model_seconds=CURVES["as the tables say"]))
    steered: list[etp.Budget | None] = []

    def train(model: nn.Module, phase: etp.Phase) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        found = phase.attach(optimizer, steps=1)
        steered.extend([] if found is None else [found.settings.budget])
        optimizer.step()

    model = network()
    result = etp.compress(model, X, train=train, evaluate=lambda _: 0.5, speed_up_latency=2, checkpoint=tmp_path)
    assert result.latency is not None
    assert abs(result.latency.miss) <= 0.1
    (budget,) = steered
    assert budget is not None
    assert budget.macs == pytest.approx(result.dense.macs / 2, rel=0.1)


def test_compress_says_where_time_and_macs_diverge(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, Formula(model_seconds=lambda macs: 5e-3 + 1e-6 * macs))
    with pytest.warns(etp.SpeedUpDiverges, match=r"as fast as the dense one, its MACs say"):
        compress(network(), latency_ms=10.0, method="torque")


def test_a_budget_in_time_takes_one_round() -> None:
    with pytest.raises(etp.BudgetError, match="with 3 rounds"):
        compress(network(), speed_up_latency=2, rounds=3)


@pytest.mark.parametrize("method", ["sfp", "greg1"])
def test_a_budget_in_time_cannot_choose_while_training(method: str) -> None:
    with pytest.raises(etp.BudgetError, match="chooses units while it trains"):
        compress(network(), speed_up_latency=2, method=method)


def test_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock(monkeypatch, Formula())
    arguments = ["prune", "tests.support.models.toy:Toy", "--input-shape", "1,3,8,8", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, "--speed-up-latency", "1.5"])
    assert done.exit_code == 0, done.output
    assert "latency: target 0.0" in done.stdout
    done = CliRunner().invoke(app, [*arguments, "--latency-ms", "0"])
    assert done.exit_code == 1
    assert "latency_ms=0.0; it must lie in (0, inf)" in done.stderr
