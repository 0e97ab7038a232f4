"""The papers' rows beside the runs: every row has a status, and each status is what the runs say."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.contest import contestants
from benchmarks.papers import norms_figure, reproduce
from benchmarks.papers.published import ROWS, TABLES, PublishedRow, published_rows, rows_of
from benchmarks.tasks import TASKS
from tests.support.models.benchmark_toy import RECIPE, Toy, fields_of


def line(
    task: str, method: str, speed_up: float, value: float, *, scale: str = "cpu", **changed: Any
) -> dict[str, Any]:
    return {
        "config": {"task": task, "scale": scale, "method": method, "speed_up": speed_up, "seed": 0},
        "title": "a small one", "metric": {"name": "accuracy", "higher": True, "percent": True}, "status": "ok",
        "recipe": fields_of(RECIPE), "test": {"dense": 0.94, "finetuned": value}, "macs": [100, 50], **changed,
    }  # fmt: skip


def row(number: int) -> PublishedRow:
    return published_rows()[number - 1]


def test_all_110_rows_are_in_the_tables_once_as_printed() -> None:
    assert len(ROWS.read_text(encoding="utf8").splitlines()) == 110
    listed = [one.number for name in TABLES for one in rows_of(name)]
    assert sorted(listed) == list(range(1, 111))
    printed = {one.number: one.printed for one in published_rows()}
    assert printed[5] == "93.44 to 93.66 (+0.22)"  # ETP, table 1: ResNet-56 at 2.93x
    assert printed[37] == "0.158 to 0.1692; MAE 0.319 to 0.3812"  # Informer at 25x
    assert printed[56] == "72.02 / 43.11 / 22.96 / 29.97"
    assert printed[101] == "73.03 to 63.91 (+6.12)"  # as printed, though it is 9.12


@pytest.mark.parametrize("one", published_rows(), ids=lambda one: str(one.number))
def test_a_row_without_a_run_says_why_or_how(one: PublishedRow) -> None:
    found = reproduce.match(one, [])
    assert found.cell is None
    assert found.status.startswith("recipe only: ")
    reason = found.status.partition(": ")[2]
    assert len(reason) > 10
    command = re.search("`python -m benchmarks contest ([a-z0-9-]+) .*--methods ([^ `]+)", reason)
    assert command or one.obstacle or "prints no figure" in reason or "figure3" in reason
    if command:
        assert command[1] in TASKS
        assert command[2] in contestants.known()


def test_no_table_names_what_the_papers_do_not_have() -> None:
    text = ROWS.read_text(encoding="utf8")
    assert not any(word in text for word in ("ViT", "DenseNet", "ResNet-164"))
    assert not [one for one in published_rows() if one.data == "SST-2" and one.speed_up == 8]


@pytest.mark.parametrize(
    ("scale", "status"), [("full", "reproduced at full size"), ("cpu", "smaller: a small one, 8 steps of 8")]
)
def test_the_status_is_that_of_the_scale(scale: str, status: str) -> None:
    found = reproduce.match(row(5), [line("cifar10-resnet56", "etp", 2.93, 0.935, scale=scale)])
    assert found.status == status
    text = reproduce.table("table1", [line("cifar10-resnet56", "etp", 2.93, 0.935, scale=scale)])
    (shown,) = [one for one in text.splitlines() if one.startswith("| 5 |")]
    assert "accuracy 94.00 to 93.50 (-0.50) | `etp`, 2.93x |" in shown


def test_the_larger_scale_and_the_nearer_speed_up_and_the_better_match_count() -> None:
    records = [
        line("cifar10-resnet56", "etp", 2.93, 0.1), line("cifar10-resnet56", "etp", 2.5, 0.2, scale="full"),
        line("cifar10-resnet56", "etp", 3.0, 0.3, scale="full"), line("cifar10-resnet56", "torque", 2.72, 0.4),
    ]  # fmt: skip
    found = reproduce.match(row(5), records).cell
    assert found is not None
    assert found.stage("finetuned").mean == 0.3  # type: ignore[union-attr]
    torque = reproduce.match(row(4), records).cell
    assert torque is not None
    assert torque.method == "torque"
    own = reproduce.match(row(4), [*records, line("cifar10-resnet56", "torque-published", 2.5, 0.5)]).cell
    assert own is not None
    assert own.method == "torque-published"


@pytest.mark.parametrize(("speed_up", "near"), [(2.0, True), (4.39, True), (1.9, False), (5.0, False)])
def test_a_run_too_far_away_does_not_count(speed_up: float, near: bool) -> None:
    found = reproduce.match(row(5), [line("cifar10-resnet56", "etp", speed_up, 0.9, scale="full")])
    assert (found.cell is not None) == near


def test_a_run_that_gave_no_network_is_told() -> None:
    failed = line("ett", "tp-groupnorm", 2.5, 0.0, status="not possible", reason="Torch-Pruning gives no answer")
    assert reproduce.match(row(20), [failed]).status == (
        "recipe only: run here, not possible: Torch-Pruning gives no answer"
    )


def test_at_1x_every_method_is_the_unpruned_network() -> None:
    assert row(17).contestants == row(18).contestants == row(19).contestants == ("dense",)


def test_the_page_counts_the_rows(tmp_path: Path) -> None:
    records = [line("cifar10-resnet56", "etp", 2.93, 0.935, scale="full"), line("sst2", "etp", 11.0, 0.8)]
    reproduce.write_page(records, tmp_path / "papers.md")
    text = (tmp_path / "papers.md").read_text(encoding="utf8")
    shown = [one for one in text.splitlines() if re.match(r"\| \d+ \|", one)]
    assert len(shown) == 110
    assert all(one.count("|") == 9 for one in shown)
    status = Counter(one.split("|")[-2].strip().partition(":")[0] for one in shown)
    for name, n in status.items():
        assert f"- {n} of 110 rows: {name}." in text
    assert status["reproduced at full size"] == 1


@pytest.mark.parametrize("arguments", [[], ["all"], ["table2"]])
def test_the_command_writes_the_page_or_prints_a_table(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ett.jsonl").write_text(json.dumps(line("ett", "etp", 2.5, 0.9)) + "\n")
    reproduce.main([*arguments, "--runs", str(tmp_path), "--out", str(tmp_path / "pages")])
    printed = capsys.readouterr().out
    assert (tmp_path / "pages" / "papers.md").exists() == ("table2" not in arguments)
    assert printed.startswith("# ETP, table 2") == ("table2" in arguments)


def test_figure_3_follows_the_norms_of_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETP_GRAPH_CACHE", str(tmp_path / "cache"))
    toy = Toy()
    path = norms_figure.draw_norms(toy, tmp_path)
    assert path.stat().st_size > 1000
    start = contestants.Start(toy, toy.build())
    group, span = next((g, s) for g, s in start.plan.spans() if g.locked is None)
    norms = norms_figure.norms_over_steps(toy, start, "etp", span)
    assert norms.shape == (toy.recipe.sparse_steps + 1, group.n_units)
    weights = dict(start.dense.named_parameters())
    want = torch.zeros(group.n_units)
    for piece in group.slices:
        if piece.tensor in weights:
            for at, unit in zip(piece.index, piece.unit, strict=True):
                want[int(unit)] += weights[piece.tensor].detach().select(piece.axis, int(at)).square().sum()
    torch.testing.assert_close(norms[0], want.sqrt())
    assert bool((norms[-1] == 0).any())
