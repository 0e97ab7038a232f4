"""Contestants: controls, methods as published, random starts, and Torch-Pruning with its own recipes."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.contest import contestants, protocol, torch_pruning
from benchmarks.contest.protocol import Config, Protocol
from benchmarks.tasks import TASKS
from tests.support.models.benchmark_toy import RECIPE, Toy


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Toy:
    """The toy, as a task of the registry; Torch-Pruning handles it."""
    monkeypatch.setenv("ETP_GRAPH_CACHE", str(tmp_path / "cache"))
    task = Toy()
    monkeypatch.setitem(TASKS, "toy", lambda scale: task)
    monkeypatch.setattr(protocol, "impossible", lambda task, scale: None)
    return task


def config(method: str, speed_up: float = 2.0) -> Config:
    return Config(task="toy", scale="smoke", method=method, speed_up=speed_up, seed=0)


@pytest.mark.parametrize("method", ["etp-hard", "etp-uniform-force", "l1-gradual", "l1-gradual-soft", "taylor-gradual"])
def test_controls_reach_the_budget_without_a_strength_to_tune(toy: Toy, method: str) -> None:
    assert not contestants.tunable(method)
    record = Protocol(toy).run(config(method))
    assert record["status"] == "ok", record
    assert record["speed_up"] >= 2
    assert record["push"] is None
    assert set(record["test"]) == {"dense", "sparse", "pruned", "finetuned"}


@pytest.mark.parametrize("method", ["torque-published", "torque-published-mf5", "etp-paper-code"])
def test_published_methods_have_their_strength_tuned_like_all_others(toy: Toy, method: str) -> None:
    record = Protocol(toy).run(config(method, 1.5))
    assert record["status"] == "ok", record
    assert [trial["push"] for trial in record["trials"]] == list(RECIPE.pushes)


def test_pruning_without_training_is_trained_for_the_steps_of_both_phases(toy: Toy) -> None:
    bench = Protocol(toy)
    toy.seen.clear()
    record = bench.run(config("oneshot"))
    assert record["status"] == "ok", record
    assert record["speed_up"] >= 2 and record["push"] is None and not record["trials"]
    assert set(record["test"]) == {"dense", "pruned", "finetuned"}
    steps = RECIPE.sparse_steps + RECIPE.finetune_steps
    assert [len(chosen) for chosen in toy.seen[-steps:]] == [RECIPE.batch_size] * steps
    calibrated = toy.seen[:-steps]  # by training examples alone, all of them in batches
    assert sorted({i for chosen in calibrated for i in chosen}) == list(range(toy.n_train))


def test_fresh_weights_train_as_long_as_the_checkpoint_and_the_phase(toy: Toy) -> None:
    long = replace(RECIPE, scratch_steps=11)
    toy.recipe = long  # type: ignore[misc]
    bench = Protocol(toy)
    toy.seen.clear()
    stages: dict[str, nn.Module] = {}
    contest = contestants.Contest(
        bench.start, toy, speed_up=2.0, seed=0, watch=lambda stage, model: stages.update({stage: copy.deepcopy(model)})
    )
    finished = contest.run("torque-published-mf5+fresh", 0.5)
    assert len(toy.seen) == 11
    assert finished.strength is not None
    assert toy.recipe is long
    begun, given = (next(net.parameters()) for net in (stages["dense"], bench.start.dense))
    assert not torch.equal(begun, given)
    assert contestants.tunable("torque-published+fresh")
    assert "etp+fresh+kd" in contestants.known()
    assert "tp-groupnorm+fresh" not in contestants.known()


@pytest.mark.parametrize(("batch", "every"), [(20, 2), (8, 4), (5, 4)])
def test_soft_pruning_zeroes_filters_after_each_pass_over_the_data(toy: Toy, batch: int, every: int) -> None:
    """40 images: 2 steps of 20; 5 of 8 and 8 of 5 are longer than the 4 steps of the phase."""
    toy.recipe = replace(RECIPE, batch_size=batch)  # type: ignore[misc]
    contest = contestants.Contest(Protocol(toy).start, toy, speed_up=2.0, seed=0, watch=lambda stage, model: None)
    assert contest._steps_of_a_pass() == every


def widths(method: str, toy: Toy) -> list[float]:
    """The share of channels that each convolution keeps after Torch-Pruning."""
    kept: list[nn.Module] = []
    contest = contestants.Contest(
        Protocol(toy).start, toy, speed_up=2.0, seed=0, watch=lambda stage, model: kept.append(copy.deepcopy(model))
    )
    contest.run(method, 0.5)
    dense = [m.out_channels for m in toy.build().modules() if isinstance(m, nn.Conv2d)]
    pruned = [m.out_channels for m in kept[-1].modules() if isinstance(m, nn.Conv2d)]
    return [a / b for a, b in zip(pruned, dense, strict=True)]


def test_torch_pruning_with_local_ratios_cuts_every_layer_alike(toy: Toy) -> None:
    first, second = widths("tp-groupnorm-local", toy)
    assert abs(first - second) < 0.1
    assert torch_pruning.PEERS["tp-groupnorm"].everywhere


def test_the_push_of_the_committed_recipe_is_summed_over_its_steps() -> None:
    """Step by step: reg 5e-4 times 4 (the mean pull), over 1 − 0.9, at the rate of each of 100 epochs."""
    total = 0.0
    for epoch in range(100):
        rate = 0.01 * (0.1 if epoch >= 60 else 1) * (0.1 if epoch >= 80 else 1)
        total += sum(5e-4 * 4 * rate / (1 - 0.9) for _ in range(50_000 // 128))
    assert torch_pruning.committed_push("tp-groupnorm") == pytest.approx(total)
    assert set(torch_pruning.COMMITTED) <= set(torch_pruning.PEERS)
    assert torch_pruning.committed_push("tp-growing") > torch_pruning.committed_push("tp-bnscale") > 0


def test_the_check_of_the_peers_has_a_limit_of_memory() -> None:
    """In a process of its own: an allocation beyond the limit fails, one below it does not."""
    code = (
        "from benchmarks.contest.torch_pruning_check import limit_memory; limit_memory(1.0)\n"
        "small = bytearray(2**26)\n"
        "try:\n    bytearray(2**31)\nexcept MemoryError:\n    print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "refused"
