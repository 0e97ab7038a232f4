"""A run that was killed continues where it was, with the same bits; its trials are not repeated."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks.common.records import read_records
from benchmarks.contest import contestants, protocol, run, training_state
from benchmarks.contest.ledger import TRIALS
from benchmarks.contest.protocol import Config, Protocol, Trial
from benchmarks.contest.training import checkpoint
from benchmarks.tasks import TASKS
from tests.support.models.benchmark_toy import RECIPE, Toy

LONG = replace(RECIPE, sparse_steps=12, finetune_steps=12, scratch_steps=24)
"""Passes end after the steps 5, 10, 15 and 20; surgery is after step 12."""


class Killed(BaseException):
    """What no code of the benchmarks catches."""


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Toy:
    task = Toy()
    task.recipe = LONG
    monkeypatch.setenv("ETP_GRAPH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(TASKS, "toy", lambda scale: task)
    monkeypatch.setattr(protocol, "impossible", lambda task, scale: None)
    monkeypatch.setattr(training_state, "LEAST_SECONDS", 0.0)
    checkpoint(task)
    task.seen.clear()
    return task


def config(method: str) -> Config:
    return Config(task="toy", scale="smoke", method=method, speed_up=2.0, seed=0)


def weights_of(
    toy: Toy, method: str, monkeypatch: pytest.MonkeyPatch, *, kill_after: int | None = None
) -> dict[str, torch.Tensor]:
    """The finished weights, of a run that dies in the step after ``kill_after`` and begins again."""
    bench, found = Protocol(toy, resumable=True), {}
    original, steps = Toy.loss, 0

    def loss(self: Toy, model: nn.Module, chosen: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps - 1 == kill_after:
            raise Killed
        noise = torch.rand(1, generator=generator) + torch.rand(1)  # augmentation and dropout
        return original(self, model, chosen, generator) * (1 + noise.squeeze())

    def keep(self: Protocol, stages: dict[str, nn.Module], model: nn.Module) -> dict[str, Any]:
        found.update({name: value.clone() for name, value in model.state_dict().items()})
        return {}

    with monkeypatch.context() as patched:
        patched.setattr(Toy, "loss", loss)
        patched.setattr(Protocol, "_metrics", keep)
        trials = [Trial(push=0.5, value=1.0), Trial(push=2.0, value=0.5)] if contestants.tunable(method) else []
        if kill_after is not None:
            with pytest.raises(Killed):
                bench.run(config(method), trials=trials)
            toy.seen.clear()
            bench = Protocol(toy, resumable=True)  # another process
        record = bench.run(config(method), trials=trials)
    assert record["status"] == "ok", record["reason"]
    bench.forget(config(method))
    return found


@pytest.mark.parametrize(
    ("method", "kill_after"),
    [
        ("dense", 11), ("etp", 11), ("etp", 19), ("etp-hard", 11), ("l1-gradual", 11), ("etp-paper", 19), ("greg2", 11),
        ("depgraph", 19), ("sfp", 11), ("sfp", 19), ("random+kd", 19), ("torque-published+fresh", 11),
    ],
)  # fmt: skip
def test_a_killed_run_ends_with_the_same_bits(
    toy: Toy, method: str, kill_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights_of(toy, method, monkeypatch)
    again = weights_of(toy, method, monkeypatch, kill_after=kill_after)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    lost = method == "sfp" and kill_after == 11  # when it sets filters to zero is no state that anybody could keep
    assert len(toy.seen) <= 28 - (
        0 if lost else 3
    )  # steps with those of calibration; at least one pass is not repeated


def test_a_peer_continues_by_phase(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights_of(toy, "tp-groupnorm", monkeypatch)
    again = weights_of(toy, "tp-groupnorm", monkeypatch, kill_after=18)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert len(toy.seen) <= 9 + 1  # and one for the scale of its strength


def test_a_checkpoint_that_was_killed_continues(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.recipe = replace(LONG, dense_steps=13)
    original = Toy.loss

    def loss(self: Toy, *args: Any) -> torch.Tensor:
        if len(self.seen) == 11:
            raise Killed
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Toy, "loss", loss)
        with pytest.raises(Killed):
            checkpoint(toy)
    toy.seen.clear()
    model = checkpoint(toy)
    assert len(toy.seen) == 3
    monkeypatch.setenv("ETP_GRAPH_CACHE", str(tmp_path / "another"))
    whole = checkpoint(toy)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_states_are_gone_when_the_line_is_there(toy: Toy, tmp_path: Path) -> None:
    run.run_all([config("torque")], tmp_path / "toy.jsonl", console=Console(quiet=True))
    assert not list((tmp_path / "cache" / "states").glob("*"))


def test_states_of_other_settings_are_removed(tmp_path: Path) -> None:
    first = training_state.folder_of(tmp_path, "run", {"commit": "a"})
    other = training_state.folder_of(tmp_path, "running", {"commit": "a"})
    for folder in (first, other):
        folder.mkdir()
    assert training_state.folder_of(tmp_path, "run", {"commit": "a"}) == first
    assert first.exists()
    assert training_state.folder_of(tmp_path, "run", {"commit": "b"}) != first
    assert not first.exists()
    assert other.exists()


def test_the_trials_of_a_killed_run_are_not_repeated(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, original, tried = tmp_path / "toy.jsonl", Protocol.try_push, []

    def dies_in_the_second(self: Protocol, own: Config, push: float) -> Trial:
        tried.append(push)
        if len(tried) == 2:
            raise Killed
        return original(self, own, push)

    monkeypatch.setattr(Protocol, "try_push", dies_in_the_second)
    start: Callable[[], int] = lambda: run.run_all([config("torque")], out, console=Console(quiet=True))  # noqa: E731
    with pytest.raises(Killed):
        start()
    assert len(read_records(tmp_path / TRIALS / "toy.jsonl")) == 1
    assert start() == 1
    assert tried == [0.5, 2.0, 2.0]
    (record,) = read_records(out)
    assert [trial["push"] for trial in record["trials"]] == [0.5, 2.0]
    assert record["phases"]["tune"] == pytest.approx(sum(trial["seconds"] for trial in record["trials"]))
    json.dumps(record)
