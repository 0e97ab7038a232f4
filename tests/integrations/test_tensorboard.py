"""Scalars while training: those that the event files hold are those of the model at that step."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import etp_graph as etp
from etp_graph.errors import EtpError, ForceError, PlanError
from etp_graph.integrations.tensorboard import TensorBoard, without_zeros
from etp_graph.plan import CostModel
from etp_graph.units import Units
from etp_graph.verification._sampling import random_selection
from tests.support.models.synthetic import synthetic
from tests.support.models.toy import toy_plan
from tests.support.training_loops import loss, toy


class Remembering:
    """A writer that keeps what it was given."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: Any, global_step: Any = None) -> None:
        self.rows.append((tag, float(scalar_value), int(global_step)))

    def of(self, name: str) -> dict[int, float]:
        return {step: value for tag, value, step in self.rows if tag == f"etp_graph/{name}"}


def strong(model: torch.nn.Module) -> etp.Regularizer:
    force = etp.forces.heaviside(epsilon=1e4, threshold=0.5)
    schedule = etp.schedules.warm_up(1.0)
    return etp.Regularizer(model, toy_plan(), force=force, beta=1e-3, schedule=schedule, steps=8)


def train(model: torch.nn.Module, regularizer: etp.Regularizer, log: Any, *, steps: int = 8) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with regularizer.attach(optimizer):
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
            log()


def test_event_files_hold_what_the_model_says(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = toy()
    regularizer = strong(model)
    log = TensorBoard(tmp_path / "logs", regularizer, every=2)
    train(model, regularizer, log)
    want = log.scalars()
    log.close()
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {f"etp_graph/{name}" for name in want}
    for name, value in want.items():
        rows = events.Scalars(f"etp_graph/{name}")
        assert [row.step for row in rows] == [2, 4, 6, 8]
        assert rows[-1].value == pytest.approx(value)


def test_reachable_is_what_surgery_of_zero_units_gives() -> None:
    model, writer = toy(), Remembering()
    regularizer = strong(model)
    train(model, regularizer, TensorBoard(writer, regularizer, every=4))
    assert writer.of("strength")[4] == pytest.approx(1e-3 / 2)
    norms = Units(model, toy_plan()).square_norms(model)
    zeros = int((norms[:14] == 0).sum())
    assert writer.of("units_at_zero")[8] == zeros > 0
    assert writer.of("share_at_zero")[8] == pytest.approx(zeros / 14)
    keep = torch.cat([norms[:14] > 0, torch.ones(5, dtype=torch.bool)])
    plan, x = toy_plan(), torch.randn(2, 3, 8, 8)
    before = model.eval()(x)
    etp.prune_(model, plan, etp.Selection.from_flat(plan, keep))
    torch.testing.assert_close(model(x), before)
    assert writer.of("reachable_macs")[8] == CostModel(etp.trace(model, x[:1], check=False)).dense.macs


def test_nothing_is_written_twice_and_the_step_is_the_users(tmp_path: Path) -> None:
    model, writer = toy(), Remembering()
    regularizer = etp.Regularizer(model, toy_plan())
    log = TensorBoard(writer, regularizer, every=1)
    train(model, regularizer, lambda: (log(7), log(7)), steps=1)
    assert len(writer.rows) == len(log.scalars())
    assert {step for _, _, step in writer.rows} == {7}
    log.close()  # the writer is the caller's


@pytest.mark.parametrize("seed", range(6))
def test_constraints_hold_whatever_is_zero(seed: int) -> None:
    plan = synthetic(seed)[1] if seed < 3 else toy_plan()
    if seed >= 3:
        first, second, last = plan.groups
        group = [replace(first, blocks=2), replace(first, multiple=3), replace(first, blocks=2, multiple=4)][seed - 3]
        plan = replace(plan, groups=(group, replace(second, min_units=4), last))
    generator = torch.Generator().manual_seed(seed)
    for share in (0.0, 0.4, 0.8, 1.0):
        zero = torch.rand(plan.n_units, generator=generator) < share
        keep = without_zeros(plan, zero)
        etp.Selection.from_flat(plan, keep).check(plan)
        assert not (~keep & ~zero).any(), "a unit that is not at zero went"
    free = without_zeros(toy_plan(), torch.ones(19, dtype=torch.bool))
    assert free.sum() == 1 + 1 + 5


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = toy()
    regularizer = etp.Regularizer(model, toy_plan())
    with pytest.raises(ForceError, match="every=0"):
        TensorBoard(Remembering(), regularizer, every=0)
    log = TensorBoard(Remembering(), regularizer)
    plan = toy_plan()
    etp.prune_(model, plan, random_selection(plan, plan.prunable, 0.5, torch.Generator().manual_seed(0)))
    with pytest.raises(PlanError, match="pruned after tracing"):
        log.scalars()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(EtpError, match=r"etp-graph\[tensorboard\]"):
        TensorBoard(tmp_path, etp.Regularizer(toy(), toy_plan()))
