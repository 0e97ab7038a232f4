"""A measurement runs in a process of its own, through the one command."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import processes
from benchmarks.common.machine import commit
from benchmarks.common.records import with_new_names

ROOT = Path(processes.__file__).parents[2]


@pytest.fixture(autouse=True)
def _checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_an_answer_comes_back_from_a_process_of_its_own() -> None:
    payload = {"model": "cifar_resnet20", "way": "export", "pruned": True, "threads": 1}
    answer = processes.run_apart("export", payload, limit=300, threads=1)
    assert answer == {"error": pytest.approx(0, abs=1e-5)}


def test_an_exception_and_a_late_answer_are_verdicts() -> None:
    answer = processes.run_apart("export", {"model": "no such field"}, limit=300, threads=1)
    assert answer["verdict"].startswith("exception: TypeError")
    late = processes.run_apart("export", {"model": "cifar_resnet20"}, limit=0.01, threads=1)
    assert late == {"verdict": "no answer in 0 s", "seconds": 0.01}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    key: str
    threads: int = 1


def test_what_the_file_has_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(command: str, payload: dict[str, Any], *, limit: float, threads: int) -> dict[str, Any]:
        asked.append(f"{command} {payload['key']}")
        return {"seconds": limit}

    monkeypatch.setattr(processes, "run_apart", answer)
    options = argparse.Namespace(results=tmp_path / "found.json", resume=True)
    body = processes.begin(options)
    settings = [Setting(key="a"), Setting(key="b")]
    processes.measure_all("speed", settings[:1], body, options.results, limit=lambda _: 3.0)
    again = processes.begin(options)
    processes.measure_all("speed", settings, again, options.results, limit=lambda _: 4.0)
    assert asked == ["speed a", "speed b"]
    assert again["measurements"] == {"a": {"seconds": 3.0}, "b": {"seconds": 4.0}}
    assert again["conditions"].keys() >= {"etp-graph", "torch", "python", "device", "cpus"}


def test_names_of_older_results_are_read() -> None:
    assert with_new_names({"cpu": "x", "cores": "2"}).items() >= {"device": "x", "cpus": "2"}.items()
    assert with_new_names({"device": "y", "cpus": "4"}) == {"device": "y", "cpus": "4"}


def test_the_commit_ignores_results(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    class Done:
        returncode, stdout = 0, "abc"

    def run(words: list[str], **options: Any) -> Done:
        asked.append(words)
        return Done()

    monkeypatch.setattr("benchmarks.common.machine.subprocess.run", run)
    assert commit() == "abc+"
    excluded = [word.removeprefix(":(top,exclude)") for word in asked[1] if word.startswith(":(")]
    assert excluded == ["benchmarks/results", "docs/results"]
    assert all((ROOT / folder).is_dir() for folder in excluded)
