"""Pruning of a folder that is not loaded: the run has a line and a row, and is not repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.records import read_records
from benchmarks.llm import streamed
from benchmarks.llm.streamed_page import page


def start(folder: Path) -> list[dict[str, Any]]:
    streamed.main([
        "--size", "tiny", "--criteria", "wanda", "--share", "0.9", "--windows", "2", "--folder", str(folder / "dense"),
        "--results", str(folder / "lines.jsonl"), "--out", str(folder / "page.md"),
    ])  # fmt: skip
    return read_records(folder / "lines.jsonl")


def test_the_run_has_a_line_and_a_row_and_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(streamed, "run_apart", lambda command, words, **rest: streamed.run_one(words))
    (line,) = start(tmp_path)
    dense, pruned = line["params"]
    assert pruned <= 0.9 * dense
    assert line["bytes"][1] < line["bytes"][0]
    assert line["tokens"] == 2 * streamed.LENGTH
    assert line["peak_gib"] >= line["imported_gib"] > 0
    assert list(line["phases"]) == ["embed", "observe", "write", "rest"]
    assert sum(line["phases"].values()) <= line["seconds"] + 0.3  # each is rounded
    text = (tmp_path / "page.md").read_text(encoding="utf8")
    assert "| `wanda` | 512 |" in text
    monkeypatch.setattr(streamed, "run_apart", lambda *words, **rest: pytest.fail("nothing is missing"))
    assert start(tmp_path) == [line]


def test_a_failed_run_leaves_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "run_apart", lambda *words, **rest: {"verdict": "exception: no space"})
    with pytest.raises(SystemExit, match="no space"):
        start(tmp_path)
    assert not read_records(tmp_path / "lines.jsonl")
    assert "No runs yet" in page([])
