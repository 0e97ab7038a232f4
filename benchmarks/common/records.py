"""Read the records of runs: one JSON line for each run, one file for each task."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RUNS = Path("benchmarks/results/runs")

PAGES = Path("docs/results")

GRADUAL = "gradual"
"""The file of :mod:`benchmarks.weights_or_units.run`, an experiment with a page of its own."""

ONLY_FULL = ("sst2", "mrpc", "flickr8k")
"""Tasks whose largest scale is not the papers' size. Lines from before it was called ``full`` say ``paper``."""

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """Return the records of a file; an empty list if there is none."""
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text(encoding="utf8").splitlines() if line.strip()]
    for record in found:
        config = record.get("config", {})
        if config.get("task") in ONLY_FULL and config.get("scale") == "paper":
            config["scale"] = "full"
    return found


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line in a single write, so that a process that is killed leaves no half line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def task_files(runs: Path) -> list[Path]:
    """Return the files of the comparison of methods in a folder."""
    return [file for file in sorted(runs.glob("*.jsonl")) if file.stem != GRADUAL]


def with_new_names(conditions: Mapping[str, str]) -> dict[str, str]:
    """Return the conditions of measurements; older results call the device ``cpu``, and the CPUs ``cores``."""
    old = {"device": conditions.get("cpu", "unknown"), "cpus": conditions.get("cores", "unknown")}
    return {**old, **conditions}


def by_scale(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the records of each scale apart, because they cannot be compared."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["config"]["scale"], []).append(record)
    return found
