"""Pruning without training on other networks: every method meets the speed-up, and a series continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.records import read_records
from benchmarks.contest import training
from benchmarks.oneshot import methods, run, search
from benchmarks.tasks import TaskUnavailableError, base, make

TASKS = {"cora": list(methods.METHODS), "sst2": ["flap", "fisher"], "cifar10-resnet56": ["taylor", "fisher"]}
"""All methods on the smallest task."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(search, "TRIALS", 2)
    monkeypatch.setattr(base, "CALIBRATION", 12)
    monkeypatch.setattr(training, "cache_root", lambda: tmp_path / "cache")


def start(folder: Path, *words: str) -> list[dict[str, Any]]:
    run.main(["--scale", "smoke", *words, "--results", str(folder / "x.jsonl"), "--out", str(folder / "x.md")])
    return read_records(folder / "x.jsonl")


@pytest.mark.parametrize("task", TASKS)
def test_every_method_prunes_and_has_a_row(tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    try:
        model = make(task, "smoke").build()
    except TaskUnavailableError as error:
        pytest.skip(str(error))
    words = ("--tasks", task, "--speed-ups", "1.5", "--methods", *TASKS[task])
    dense, *rows = start(tmp_path, *words)
    assert dense["config"]["method"] == "dense"
    goods = {one["config"]["made_good"] for one in rows}
    assert goods == {"nothing", "weights", "blend"} | ({"norms"} if "resnet" in task else set())
    assert len(rows) == len(goods) * len(TASKS[task])
    for one in rows:
        whole, left = one["params"]
        assert whole == sum(parameter.numel() for parameter in model.parameters())
        assert left < whole
        assert 0 <= one["value"] <= 1
    page = (tmp_path / "x.md").read_text(encoding="utf8")
    assert all(f"| `{name}` |" in page for name in TASKS[task])
    monkeypatch.setattr(run, "run_one", lambda *_: pytest.fail("nothing is missing"))
    start(tmp_path, *words)
    assert (tmp_path / "x.md").read_text(encoding="utf8") == page
