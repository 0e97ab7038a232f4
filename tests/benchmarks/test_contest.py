"""The comparison: tasks at a toy scale, the protocol's promises, the runner, the pages."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks.common.records import read_records
from benchmarks.contest import contestants, protocol, run, strength, torch_pruning
from benchmarks.contest import torch_pruning_check as check
from benchmarks.contest.protocol import Config, Protocol, Trial
from benchmarks.contest.training import checkpoint, train
from benchmarks.recipes import recipe
from benchmarks.recipes import weight_decay as decay
from benchmarks.tasks import CONDITIONS, TASKS, Recipe, Task, TaskUnavailableError, base, make
from benchmarks.tasks import cifar10 as cifar10_task
from benchmarks.tasks.glue import Glue
from benchmarks.tasks.graphs import roc_auc
from etp_graph import methods
from etp_graph.demo.zoo.data import Split
from tests.support.models.benchmark_toy import RECIPE, Toy, fields_of


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETP_GRAPH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The toy, as the only task of the registry; Torch-Pruning handles it."""
    task = Toy()
    monkeypatch.setitem(TASKS, "toy", lambda scale: task)
    monkeypatch.setattr(protocol, "impossible", lambda task, scale: None)
    return task


def config(method: str, *, speed_up: float = 2.0, seed: int = 0, task: str = "toy") -> Config:
    return Config(task=task, scale="smoke", method=method, speed_up=speed_up, seed=seed)


@cache
def loaded(name: str) -> Task:
    """A real task at the toy scale; without its data the test is skipped."""
    try:
        return make(name, "smoke")
    except TaskUnavailableError as error:
        pytest.skip(str(error))


# Every task.


@pytest.mark.parametrize("name", TASKS)
def test_task_builds_trains_evaluates_and_is_pruned(name: str) -> None:
    task = loaded(name)
    model = task.build()
    before = copy.deepcopy(model.state_dict())
    train(task, model, steps=1, peak=1e-3, seed=0, start=0)
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    bench = Protocol(task)
    for method in ("etp", "random"):
        record = bench.run(config(method, speed_up=1.25, task=name))
        assert record["status"] == "ok", record["reason"]
        assert math.isfinite(record["test"]["finetuned"])
        assert record["speed_up"] > 1.2
        assert record["params"][1] < record["params"][0]
        assert ("sparse" in record["test"]) == (method == "etp")
        json.dumps(record)


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_changes_the_recipe_and_nothing_else(name: str, tmp_path: Path) -> None:
    task, usual = loaded(name), loaded(CONDITIONS[name][0])
    own, other = task.recipe, usual.recipe
    assert own != other
    assert task.title.startswith(usual.title + ", ")
    assert (task.name, task.metric, task.prune, task.n_train) == (usual.name, usual.metric, usual.prune, usual.n_train)
    if own.optimizer != other.optimizer:
        rates = {"sparse_rate": own.sparse_rate, "finetune_rate": own.finetune_rate}
        assert own == replace(other, optimizer=own.optimizer, **rates)
    elif name.endswith("-twice"):
        phases = {"sparse_steps": 2 * other.sparse_steps, "finetune_steps": 2 * other.finetune_steps}
        assert own == replace(other, **phases)
    else:
        steps, after = other.dense_steps + other.sparse_steps, other.finetune_steps
        if not other.dense_steps:  # given weights: all steps are before surgery
            steps, after = other.sparse_steps + other.finetune_steps, 0
        expected = {"dense_steps": 0, "sparse_steps": steps, "finetune_steps": after, "sparse_rate": other.dense_rate}
        assert own == replace(other, **expected)
        torch.manual_seed(0)
        fresh = task.build().state_dict()
        assert all(torch.equal(fresh[key], value) for key, value in checkpoint(task).state_dict().items())
        assert not (tmp_path / "cache").exists()
    record = Protocol(task, blind=True).run(config("etp", speed_up=1.25, task=name))
    assert record["status"] == "ok", record["reason"]


def test_all_data_of_a_task_is_moved() -> None:
    toy = Toy()
    toy.place()
    toy.nested = {"a": [(toy.x, None)], "b": "text"}  # type: ignore[attr-defined]
    moved = base._moved(toy.nested, torch.device("meta"))  # type: ignore[attr-defined]
    assert moved["a"][0][0].device.type == "meta"
    assert moved["b"] == "text"


def test_parts_of_tasks_are_apart() -> None:
    task: Any = loaded("sst2")
    texts = {part: set(map(tuple, inputs["input_ids"].tolist())) for part, (inputs, _) in task.parts.items()}
    assert not texts["train"] & texts["test"]
    assert len(texts["val"]) == 8


def test_given_weights_are_judged_by_images_that_they_never_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = torch.arange(30), torch.arange(100, 160)

    def read(*, limit: int, validation: int, test_limit: int) -> Split:
        none = train[:validation]
        return Split(
            train_x=train[:limit], train_y=-train[:limit], val_x=none, val_y=none, test_x=test[:test_limit],
            test_y=-test[:test_limit],
        )  # fmt: skip

    monkeypatch.setattr(cifar10_task, "cifar10", read)
    split = cifar10_task._held_out(cifar10_task.Sizes(train=30, val=20, test=40))
    assert torch.equal(split.train_x, train)
    assert torch.equal(torch.cat([split.val_x, split.test_x]), test)
    assert torch.equal(torch.cat([split.val_y, split.test_y]), -test)
    assert len(split.val_x) == 20
    held_out, shorter = cifar10_task.HELD_OUT, cifar10_task.SIZES["cpu"]
    assert held_out.val >= shorter.test  # the shorter runs have read those test images: no test part of whole data does
    assert (held_out.train, held_out.val + held_out.test) == (50_000, 10_000)


def test_batches_of_like_lengths_are_a_pass_over_all_examples() -> None:
    task = copy.copy(loaded("sst2"))
    assert isinstance(task, Glue)
    lengths = torch.randint(1, 12, (403,), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < lengths.unsqueeze(1)).long()
    task.parts = {"train": ({"attention_mask": mask}, lengths)}
    plain = [lengths[batch].amax() for batch in task.batches(seed=1, start=0, steps=100)]
    task.sizes = replace(task.sizes, bucket=100)
    batches = list(task.batches(seed=1, start=0, steps=100))
    assert len(set(torch.cat(batches).tolist())) == 400
    assert sum(lengths[batch].amax() for batch in batches) < 0.8 * sum(plain)
    again = list(task.batches(seed=1, start=40, steps=60))
    assert all(torch.equal(a, b) for a, b in zip(batches[40:], again, strict=True))
    longest = torch.stack([lengths[batch].amax() for batch in batches])
    assert not torch.equal(longest, longest.sort().values)  # short and long batches take turns


@pytest.mark.parametrize("name", ["sst2", "mrpc", "flickr8k"])
def test_tasks_without_the_size_of_the_papers_say_so(name: str) -> None:
    with pytest.raises(TaskUnavailableError, match=r"--scale full|missing"):
        TASKS[name]("paper")


def test_area_under_the_curve_is_the_share_of_ordered_pairs() -> None:
    assert roc_auc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0.0, 0.0, 1.0, 1.0])) == 0.75
    assert roc_auc(torch.ones(4), torch.tensor([0.0, 1.0, 1.0, 0.0])) == 0.5


# What the protocol promises.


@pytest.mark.parametrize("method", ["etp", "torque", "tp-groupnorm", "tp-bnscale", "tp-growing", "random"])
def test_tuning_reads_the_validation_part_only(toy: Toy, method: str) -> None:
    bench = Protocol(toy)
    trials = bench.tune(config(method)) if contestants.tunable(method) else []
    assert set(toy.read) <= {"val"}
    assert len(trials) == (len(RECIPE.pushes) if contestants.tunable(method) else 0)
    toy.read.clear()
    bench.run(config(method))
    stages = 2 if method == "random" else 3
    assert toy.read.count("test") == stages + 1  # every stage once, and the checkpoint


def test_the_test_part_is_read_after_all_training(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(Toy, "evaluate", lambda self, model, part: events.append(part) or 0.5)
    original = Toy.loss
    monkeypatch.setattr(Toy, "loss", lambda self, *args: events.append("step") or original(self, *args))
    Protocol(toy).run(config("etp"))
    assert "step" not in events[events.index("test") :]


@pytest.mark.parametrize("method", ["dense", "random", "l1-uniform", "etp", "depgraph", "tp-groupnorm", "tp-growing"])
def test_every_contestant_sees_the_same_batches(toy: Toy, method: str) -> None:
    bench = Protocol(toy)
    if contestants.tunable(method):
        trials = [Trial(push=0.5, value=1.0)]
        toy.seen.clear()
        bench.run(config(method), trials=trials)
    else:
        toy.seen.clear()
        bench.run(config(method))
    expected = [batch.tolist() for batch in toy.batches(seed=0, start=0, steps=8)]
    assert toy.seen[-8:] == expected


def test_batches_depend_on_seed_and_number_only() -> None:
    toy = Toy()
    whole = [b.tolist() for b in toy.batches(seed=3, start=0, steps=9)]
    assert whole[4:] == [b.tolist() for b in toy.batches(seed=3, start=4, steps=5)]
    assert whole != [b.tolist() for b in toy.batches(seed=4, start=0, steps=9)]
    assert sorted(chain.from_iterable(whole[:5])) == list(range(40))


@pytest.mark.parametrize("name", sorted(n for n, m in methods.METHODS.items() if m.force is not None and not m.steered))
def test_strength_of_a_push_falls_with_the_length_of_the_phase(toy: Toy, name: str) -> None:
    bench = Protocol(toy)
    beta = strength.reference(toy, bench.start.dense, bench.start.plan, methods.get(name))
    assert 0 < beta < math.inf
    longer = copy.copy(toy)
    longer.recipe = Recipe(**{**fields_of(RECIPE), "sparse_steps": 40})
    assert strength.reference(longer, bench.start.dense, bench.start.plan, methods.get(name)) < beta


def test_small_dense_has_the_macs_and_fresh_weights(toy: Toy) -> None:
    record = Protocol(toy).run(config("small-dense"))
    assert record["speed_up"] >= 2
    assert set(record["test"]) == {"dense", "finetuned"}


def test_small_dense_begins_with_the_spread_of_its_own_width(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[nn.Module] = []

    def keep(task: Task, model: nn.Module, **options: object) -> None:
        begun.append(copy.deepcopy(model))

    bench = Protocol(toy)
    monkeypatch.setattr(contestants, "train", keep)
    contestants.Contest(bench.start, toy, speed_up=6.0, seed=0, watch=lambda stage, model: None).run("small-dense", 1.0)
    for layer in begun[0].modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            bound = (layer.weight.numel() / len(layer.weight)) ** -0.5  # of the default of PyTorch: uniform
            assert 0.9 * bound < layer.weight.abs().max() <= bound


def test_what_cannot_be_done_is_a_record_with_its_reason(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Protocol(toy).run(config("etp", speed_up=1e6))
    assert record["status"] == "not possible"
    assert "BudgetError" in record["reason"]
    monkeypatch.setattr(protocol, "impossible", lambda task, scale: "Torch-Pruning finds no group to prune")
    record = Protocol(toy).run(config("tp-groupnorm"))
    assert (record["status"], record["reason"]) == ("not possible", "Torch-Pruning finds no group to prune")


def test_a_peer_that_raises_is_a_record(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise KeyError("grad_fn")

    monkeypatch.setattr(torch_pruning, "compress", broken)
    record = Protocol(toy).run(config("tp-groupnorm"))
    assert record["status"] == "not possible"
    assert "KeyError" in record["reason"]
    monkeypatch.setattr(contestants.etp, "compress", broken)
    with pytest.raises(KeyError):  # an error of ours is no result
        Protocol(toy).run(config("random"))


def test_the_better_trial_wins_and_the_weaker_of_equal_ones() -> None:
    bench = Protocol.__new__(Protocol)
    bench.task = Toy()
    assert bench.best([Trial(push=1, value=0.5), Trial(push=2, value=0.7), Trial(push=3, value=None)]) == 2
    assert bench.best([Trial(push=2, value=0.5), Trial(push=1, value=0.5)]) == 1
    with pytest.raises(FloatingPointError, match="every trial"):
        bench.best([Trial(push=1, value=None)])


@pytest.mark.parametrize(("name", "verdict"), [("cifar10", "OK"), ("sst2", "OK"), ("ptb", "no group")])
def test_torch_pruning_is_judged_by_what_its_network_computes(name: str, verdict: str) -> None:
    loaded(name)
    assert check.verdict(name, "smoke")["verdict"] == verdict


def test_torch_pruning_is_told_the_heads_of_bert_and_sees_frozen_embeddings() -> None:
    model = loaded("sst2").build()
    attention = model.get_submodule("bert.encoder.layer.0.attention.self")
    assert torch_pruning.heads(model)[attention.get_submodule("value")] == 12
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen
    with torch_pruning.learning(model):
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == frozen
    attention.query = nn.Linear(384, 240)
    torch_pruning.resize_heads_(model)
    assert (attention.attention_head_size, attention.all_head_size) == (20, 240)


def test_a_checkpoint_is_trained_once(toy: Toy) -> None:
    first = checkpoint(toy)
    toy.seen.clear()
    second = checkpoint(toy)
    assert not toy.seen
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_seeds_have_checkpoints_of_their_own_where_nothing_else_varies(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Protocol(toy)
    plain.begin_with(1)
    assert plain.seed == 0
    monkeypatch.setattr(toy, "own_checkpoints", True, raising=False)
    bench = Protocol(toy)
    seen = []
    for seed in (0, 1, protocol.TUNING_SEED, 0):
        bench.begin_with(seed)
        seen.append(torch.cat([p.detach().flatten() for p in bench.start.dense.parameters()]))
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    bench.run(config("torque", seed=1))  # tuned with the tuning seed's
    assert bench.seed == 1


# The runner.


def test_runner_skips_what_is_done_and_tunes_once(toy: Toy, tmp_path: Path) -> None:
    out = tmp_path / "toy.jsonl"
    arguments = ["toy", "--scale", "smoke", "--methods", "etp", "random", "dense", "--out", str(out), "--seeds"]
    run.main([*arguments, "0"])
    lines = out.read_text().splitlines()
    assert [json.loads(line)["config"]["method"] for line in lines] == ["etp", "random", "dense"]
    toy.read.clear()
    run.main([*arguments, "0"])
    assert out.read_text().splitlines() == lines
    assert not toy.read
    toy.seen.clear()
    run.main([*arguments, "0", "1"])
    records = read_records(out)
    assert len(records) == 6
    assert len(toy.seen) == 3 * 8  # three full runs, no trial
    assert records[3]["trials"] == records[0]["trials"]


def test_runner_knows_every_preset_of_the_library() -> None:
    assert set(methods.METHODS) <= set(contestants.known())
    with pytest.raises(SystemExit):
        run.main(["cifar10", "--methods", "no-such-method"])


def test_configs_run_the_dense_control_once_for_each_seed() -> None:
    found = run.configs("toy", "cpu", ["dense", "etp"], [2, 4], [0, 1])
    assert [(c.method, c.speed_up, c.seed) for c in found] == [
        ("dense", 1, 0), ("etp", 2, 0), ("etp", 4, 0), ("dense", 1, 1), ("etp", 2, 1), ("etp", 4, 1),
    ]  # fmt: skip


def test_the_runner_prints_a_line_for_each_run(toy: Toy, tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    run.run_all([config("random")], tmp_path / "toy.jsonl", console=console)
    assert "toy random 2x seed 0: accuracy dense" in console.export_text()


# Distillation.


@pytest.mark.parametrize("method", ["etp+kd", "random+kd", "tp-groupnorm+kd", "small-dense+kd", "dense+kd"])
def test_every_contestant_can_be_distilled(toy: Toy, method: str) -> None:
    plain, taught = (Protocol(toy).run(config(name)) for name in (method.removesuffix("+kd"), method))
    assert taught["status"] == "ok"
    assert taught["macs"] == plain["macs"]
    for stage in set(plain["test"]) - {"finetuned"}:
        assert taught["test"][stage] == plain["test"][stage]  # the teacher speaks while fine-tuning only


# How a weight decay is chosen.


def test_a_weight_decay_is_judged_unpruned_and_never_by_the_test_part(toy: Toy) -> None:
    toy.read.clear()
    text = decay.table(toy, [toy.recipe.weight_decay, 50.0], seed=7)
    assert toy.read == ["val"] * 6
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("|")]
    assert rows == ["| weight decay", "| ---:", "| **0.0005**", "| 50"]
    plain, decayed = (decay.stages(toy, value, seed=7) for value in (toy.recipe.weight_decay, 50.0))
    assert len(plain) == len(decay.PHASES)
    assert plain != decayed


def test_a_recipe_in_a_precision_that_is_emulated_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe, "precision_here", lambda wanted, device: "fp32")
    monkeypatch.setattr(recipe, "search", lambda *_, **__: pytest.fail("it is refused first"))
    with pytest.raises(SystemExit):
        recipe.main(["cora", "--scale", "smoke", "--precisions", "bf16"])
    assert "bf16: this processor emulates it" in capsys.readouterr().err
