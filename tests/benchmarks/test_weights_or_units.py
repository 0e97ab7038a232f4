"""Single weights or whole units: equal numbers, equal training, and a page made of its lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.common.machine import parameters
from benchmarks.common.records import read_records
from benchmarks.report import run as report
from benchmarks.tasks import Metric, Part, Task
from benchmarks.tasks.ptb import Ptb
from benchmarks.weights_or_units import contestants as gradual_contest
from benchmarks.weights_or_units import page as gradual_page
from benchmarks.weights_or_units import run as gradual
from benchmarks.weights_or_units.contestants import (
    METHODS,
    RATES,
    SCHEDULE,
    TASK,
    Config,
    Experiment,
    best,
    widest,
    with_width,
)
from benchmarks.weights_or_units.masks import target
from tests.support.models.benchmark_toy import RECIPE


class Words(Ptb):
    """The language model on random words. Knows which parts were read, and which examples were trained on."""

    def __init__(self) -> None:
        Task.__init__(self, "smoke")
        self.recipe, self.words, self.width, self.title = RECIPE, 30, 24, "a toy"
        generator = torch.Generator().manual_seed(0)
        self.parts = {part: torch.randint(30, (40, 9), generator=generator) for part in ("train", "val", "test")}
        self.read: list[str] = []
        self.seen: list[list[int]] = []
        self.sizes: list[int] = []

    def loss(self, model: nn.Module, chosen: Tensor, generator: torch.Generator) -> Tensor:
        self.seen.append(chosen.tolist())
        self.sizes.append(parameters(model))
        return super().loss(model, chosen, generator)

    def evaluate(self, model: nn.Module, part: Part) -> float:
        self.read.append(part)
        return super().evaluate(model, part)


@pytest.fixture(autouse=True)
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Words:
    """The toy in place of the Penn Treebank."""
    monkeypatch.setenv("ETP_GRAPH_CACHE", str(tmp_path / "cache"))
    task = Words()
    monkeypatch.setattr(gradual, "Ptb", lambda scale: task)
    return task


def config(method: str, *, sparsity: float = 0.5, seed: int = 0) -> Config:
    return Config(task=TASK, scale="smoke", method=method, sparsity=sparsity, seed=seed)


# The comparison.


@pytest.mark.parametrize("method", METHODS)
def test_contestants_have_equal_numbers_and_see_the_same_batches(toy: Words, method: str) -> None:
    experiment = Experiment(toy)
    sparsity = 0.0 if method == "dense" else 0.5
    experiment.trials[0.5] = [{"rate": 0.01, "val": 1.0}]
    toy.seen.clear()
    record = experiment.run(config(method, sparsity=sparsity))
    assert record["status"] == "ok", record.get("reason")
    dense, own = record["params"]
    masked = method in ("dense", "large-sparse")
    assert (own == dense) == masked
    if masked:
        assert record["nonzero"][1] == record["target"]
    else:
        assert 0.93 * record["target"] < record["nonzero"][1] == own <= record["target"]  # units are coarse here
    steps = RECIPE.sparse_steps + RECIPE.finetune_steps + (RECIPE.dense_steps if method == "small-dense" else 0)
    assert toy.seen == [batch.tolist() for batch in toy.batches(seed=0, start=0, steps=steps)]
    json.dumps(record)


def test_small_dense_is_the_widest_that_fits_with_weights_of_its_width(toy: Words) -> None:
    goal = target(toy.build(), 0.75)
    width = widest(toy, goal)
    assert parameters(with_width(toy, width)) <= goal < parameters(with_width(toy, width + 1))
    assert toy.width == 24
    bound = float(with_width(toy, width).get_parameter("rnn.weight_hh_l0").detach().abs().max())
    assert 24**-0.5 < bound <= width**-0.5  # of a wide network the weights would be smaller


def test_learning_rates_are_chosen_on_the_validation_part(toy: Words) -> None:
    experiment = Experiment(toy)
    assert toy.read == ["val"] * len(RATES)
    chosen = min(experiment.tried, key=lambda trial: trial["val"])["rate"]
    recipe = experiment.task.recipe
    assert recipe.dense_rate == chosen
    assert recipe.sparse_rate / RECIPE.sparse_rate == pytest.approx(chosen / RECIPE.dense_rate)
    assert toy.recipe == RECIPE
    toy.read.clear(), toy.seen.clear()
    experiment.network(config("small-dense"))
    assert toy.read == ["val"] * len(RATES)
    toy.seen.clear()
    record = experiment.run(config("small-dense", seed=1))
    assert len(toy.seen) == RECIPE.dense_steps + RECIPE.sparse_steps + RECIPE.finetune_steps  # no trial again
    assert gradual.earlier_trials([json.loads(json.dumps(record))], toy) == experiment.trials


def test_the_best_trial_is_that_of_the_better_metric() -> None:
    trials = [{"rate": 1.0, "val": None}, {"rate": 2.0, "val": 9.0}, {"rate": 3.0, "val": 8.0}]
    assert best(trials, Ptb.metric) == 3.0  # less perplexity is better
    assert best(trials, Metric(name="accuracy")) == 2.0
    with pytest.raises(FloatingPointError, match="every trial"):
        best(trials[:1], Ptb.metric)


def test_the_checkpoint_is_not_changed(toy: Words) -> None:
    experiment = Experiment(toy)
    before = [p.clone() for p in experiment.dense.parameters()]
    for method in METHODS:
        experiment.network(config(method))
    assert all(torch.equal(a, b) for a, b in zip(before, experiment.dense.parameters(), strict=True))


def test_units_go_along_the_schedule(toy: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradual_contest, "EVERY", 1)
    experiment = Experiment(toy)
    toy.sizes.clear()
    experiment.network(config("large-pruned-by-units"))
    dense, goal = parameters(experiment.dense), target(experiment.dense, 0.5)
    rising = RECIPE.sparse_steps
    for step, size in enumerate(toy.sizes):
        aim = dense - SCHEDULE(min(1.0, step / rising)) * (dense - goal)
        assert 0.93 * aim < size <= aim + 1
    assert len(set(toy.sizes[:rising])) == rising
    assert len(set(toy.sizes[rising:])) == 1  # nothing goes in the second phase


def test_the_test_part_is_read_once_after_all_training(toy: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment(toy)
    events: list[str] = []
    monkeypatch.setattr(Words, "evaluate", lambda self, model, part: events.append(part) or 0.5)
    original = Words.loss
    monkeypatch.setattr(Words, "loss", lambda self, *args: events.append("step") or original(self, *args))
    experiment.run(config("large-sparse"))
    assert "step" not in events[events.index("val") :]
    assert events.count("test") == 2  # the checkpoint, once for all runs, and the network
    experiment.run(config("large-sparse"))
    assert events.count("test") == 3


@pytest.mark.parametrize("method", ["small-dense", "large-pruned-by-units"])
def test_what_is_out_of_reach_is_a_record_with_its_reason(
    toy: Words, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradual_contest, "target", lambda model, sparsity: 1)
    record = Experiment(toy).run(config(method))
    assert record["status"] == "not possible"
    assert "BudgetError" in record["reason"]


# The command, the lines, the page.


def test_command_goes_on_where_it_stopped(toy: Words, tmp_path: Path) -> None:
    out, where = tmp_path / "page.md", tmp_path / "gradual.jsonl"
    arguments = ["--scale", "smoke", "--sparsities", "0.5", "--results", str(where), "--out", str(out), "--seeds"]
    gradual.main([*arguments, "0"])
    lines = where.read_text().splitlines()
    assert [json.loads(line)["config"]["method"] for line in lines] == list(METHODS)
    gradual.main([*arguments, "0", "1"])
    assert where.read_text().splitlines()[: len(lines)] == lines
    assert len(read_records(where)) == 2 * len(METHODS)
    toy.read.clear(), toy.seen.clear()
    text = out.read_text()
    gradual.main([*arguments, "0", "1"])
    assert not toy.read and not toy.seen
    assert out.read_text() == text
    with pytest.raises(SystemExit):
        gradual.main(["--sparsities", "1.5"])


def line(method: str, seed: int, value: float, *, sparsity: float = 0.5, latency: float = 2.0) -> dict[str, Any]:
    return {
        "config": {"task": "ptb", "scale": "cpu", "method": method, "sparsity": sparsity, "seed": seed},
        "title": "a toy", "metric": {"name": "perplexity", "higher": False, "percent": False}, "status": "ok",
        "recipe": json.loads(json.dumps({f: getattr(RECIPE, f) for f in RECIPE.__dataclass_fields__})),
        "schedule": SCHEDULE.to_dict(), "every": 10, "checkpoint": "given", "conditions": {"torch": "2"},
        "commit": "abc", "seconds": 6.0, "val": {"checkpoint": 80.0, "final": value + 1},
        "test": {"checkpoint": 82.0, "final": value}, "rates": [1.0, 0.1, 0.2],
        "target": 500, "nonzero": [1000, 500], "params": [1000, 1000],
        "latency": [2.0, latency], "trials": [{"rate": 0.5, "val": None}, {"rate": 1.0, "val": 90.0}],
    }  # fmt: skip


def lines() -> list[dict[str, Any]]:
    return [
        *(line("large-sparse", seed, value) for seed, value in enumerate((70.0, 71.0, 72.0))),
        *(line("small-dense", seed, 80.0 + 2 * seed, latency=x) for seed, x in enumerate((2.0, 1.0, 2 / 3))),
        *(line("large-pruned-by-units", seed, x, latency=1.0) for seed, x in enumerate((69.0, 71.5, 74.0))),
    ]  # fmt: skip


def test_page_says_what_the_lines_say() -> None:
    text = gradual_page.page(lines())
    assert "| 50 % | large-sparse | 71.00 ± 1.00 | 72.00 ± 1.00 | 500 | 50.0 % | 1.00x (1.00 to 1.00) | 3 |" in text
    assert "At 50 % zeros **large-sparse** has the best mean" in text
    assert (
        "large-pruned-by-units +0.50 [-3.23, +4.23] (not significant); small-dense +11.00 [+8.52, +13.48] (worse)"
        in text
    )
    assert "large-sparse against small-dense: -11.00 [-13.48, -8.52] (better) at 50 %" in text
    assert "checkpoint: 0.5 (diverged), **1 (90.0)**\\*. The two phases after it, in proportion: 0.1 and 0.2." in text
    assert "small-dense, 50 %: 0.5 (diverged), **1 (90.0)**\\*" in text
    assert "| - | checkpoint | 82.00 | 80.00 | 1,000 |" in text
    assert "| 50 % | small-dense | 82.00 ± 2.00 | 83.00 ± 2.00 | 500 | 50.0 % | 2.00x (1.00 to 3.00) | 3 |" in text
    assert "large-sparse 1.00x; large-pruned-by-units 2.00x; small-dense 2.00x" in text
    rows = [row.split(" | ")[1] for row in text.splitlines() if row.startswith("| 50 %")]
    assert rows == list(METHODS[1:])  # whatever the order of the lines
    swapped = [{**one, "config": {**one["config"], "method": other}} for one, other in _swapped()]
    assert "**small-dense** has the best mean" in gradual_page.page(swapped)


def _swapped() -> list[tuple[dict[str, Any], str]]:
    names = {"large-sparse": "small-dense", "small-dense": "large-sparse"}
    return [(one, names.get(one["config"]["method"], one["config"]["method"])) for one in lines()]


def test_pages_of_the_comparison_leave_these_lines_alone(tmp_path: Path) -> None:
    (tmp_path / "gradual.jsonl").write_text(json.dumps(lines()[0]) + "\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "gradual.md").write_text("")
    *_, index = report.write(tmp_path, tmp_path / "out")
    assert [path.stem for path in (tmp_path / "out").glob("*.md")].count("gradual") == 1
    assert "(gradual.md)" in index.read_text()
