"""The cost of the check: measured in a process of its own, and written to a page that says what was missed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.models import registry
from benchmarks.speed import check, probes
from benchmarks.speed.check_page import write_check_page


def line(model: str, forward: float, *, trace: float, verify: float = 9.0) -> dict[str, Any]:
    seconds = {"forward": forward, "unchecked": forward, "trace": trace * forward, "verify": verify * forward}
    spreads = {what: {"median": value, "low": value, "high": value} for what, value in seconds.items()}
    return {"model": model, "family": "none", "repetitions": 3, "conditions": {"cpu": "toy"}, **spreads}


def test_the_page_has_medians_and_missed_targets(tmp_path: Path) -> None:
    lines = [line("a", 1.0, trace=6.0), line("b", 0.2, trace=7.0), line("c", 0.001, trace=50.0)]
    late = {"model": "d", "verdict": "no answer in 600 s"}
    write_check_page([line("a", 1.0, trace=99.0), *lines, late], tmp_path / "page.md", listed="abcde")
    text = (tmp_path / "page.md").read_text()
    assert (
        "- 3 models (all), forwards at the median: trace without check 1.0, its check 6.0, trace 7.0, verify 9.0."
        in text
    )
    assert "Target missed, all" not in text
    assert "Target missed, forward below 10 ms: `trace` takes 50.0 forwards" in text
    assert "- Not measured: `d` (no answer in 600 s)." in text
    assert "- 1 models of the sample were not measured: `e`." in text
    assert "99.0" not in text


def test_a_sample_covers_the_registry_and_stays_the_same() -> None:
    names = list(registry())
    found = check.sample(names)
    assert len(set(found)) == len(found) == -(-len(names) // check.STEP)
    assert found == check.sample(names) != sorted(found, key=names.index)


def test_a_small_model_is_measured() -> None:
    found = check.run_forked("rnn:gru_classifier", 1, limit=300)
    assert all(found[what]["median"] > 0 for what in ("forward", "unchecked", "trace", "verify"))


def test_a_process_that_dies_or_raises_gives_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "KeyError" in check.run_forked("no such model", 1, limit=300)["verdict"]
    monkeypatch.setattr(probes, "check", lambda *arguments: os._exit(3))
    assert check.run_forked("rnn:gru_classifier", 1, limit=300) == {"verdict": "the process died"}
