"""Training of a pruned language model: every way trains, the rate is chosen by validation, and a series continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.records import read_records
from benchmarks.llm import recovery
from benchmarks.llm.training import RECOVERIES
from tests.support.models.benchmark_llm import build, use_toy


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    use_toy(monkeypatch, recovery)
    monkeypatch.setattr(recovery, "TUNING_STEPS", 2)


def start(folder: Path, *words: str) -> list[dict[str, Any]]:
    recovery.main([*words, "--results", str(folder / "lines.jsonl"), "--out", str(folder / "page.md")])
    return read_records(folder / "lines.jsonl")


def test_every_way_trains_a_model_of_the_right_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    records = start(tmp_path, "--steps", "8", "--share", "0.7")
    rows = [one for one in records if "how" in one["config"]]
    assert [(one["config"]["method"], one["config"]["how"]) for one in rows] == list(recovery.RUNS)
    target = recovery.units_target(build(), 0.7)
    for one in rows:
        how = one["config"]["how"]
        tuned = [line for line in records if line["config"].get("tuned") == how]
        tried = {line["config"]["rate"]: line["valid"] for line in tuned}
        assert set(tried) == set(RECOVERIES[how].rates)
        assert one["rate"] == min(tried, key=tried.__getitem__)
        if one["before"] is None or one["config"]["method"] != "dense":
            assert one["params"] <= target + 32 * 10  # flap adds biases to two layers of each block
        if one["before"] is not None:
            assert one["perplexity"]["ptb"] < one["before"]["ptb"]
    page = (tmp_path / "page.md").read_text(encoding="utf8")
    assert all(f"`{how}`" in page for how in RECOVERIES)
    monkeypatch.setattr(recovery, "load_smollm2", lambda: pytest.fail("nothing is missing"))
    start(tmp_path, "--steps", "8", "--share", "0.7")
    assert (tmp_path / "page.md").read_text(encoding="utf8") == page
