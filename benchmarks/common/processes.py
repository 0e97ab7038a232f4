"""Measurements in processes of their own: a crash, an endless loop or a lack of memory is a result too."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.models import FAMILIES, registry
from etp_graph.demo.zoo.machine import machine_record

_LIBRARIES = ("torch", "torchvision", "timm", "transformers", "torch-geometric", "torch-pruning")


def run_apart(command: str, payload: dict[str, Any], *, limit: float, threads: int) -> dict[str, Any]:
    """Return what ``python -m benchmarks COMMAND --one JSON`` prints as its last line, or a verdict why it did not."""
    words = [sys.executable, "-m", "benchmarks", command, "--one", json.dumps(payload)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    try:
        done = subprocess.run(  # noqa: S603 - this program itself
            words,
            check=False,
            capture_output=True,
            text=True,
            timeout=limit,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return {"verdict": f"no answer in {limit:.0f} s", "seconds": limit}
    if done.returncode == 0:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer
    last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    return {"verdict": f"exception: {last[0]}", "seconds": time.perf_counter() - start}


def processor_record() -> dict[str, str]:
    """Return versions and hardware of measurements on the processor."""
    return machine_record(_LIBRARIES, accelerator=False)


class Setting(Protocol):
    """One measurement: a dataclass of what to measure, with a name of its own."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def key(self) -> str:
        """Its name among the measurements."""

    @property
    def threads(self) -> int:
        """How many threads it has."""


def add_arguments(parser: argparse.ArgumentParser, *, results: Path, out: Path, limit: float) -> None:
    """The arguments that all commands share."""
    parser.add_argument("--out", type=Path, default=out, help="the page")
    parser.add_argument("--results", type=Path, default=results, help="the measurements, as JSON")
    parser.add_argument("--limit-seconds", type=float, default=limit, help="for each measurement")
    parser.add_argument("--resume", action="store_true", help="keep what the JSON file has")
    parser.add_argument("--one", help=argparse.SUPPRESS)


def add_models(parser: argparse.ArgumentParser) -> None:
    """The arguments that choose models of the registry, and how many are measured at a time."""
    parser.add_argument("--models", nargs="*", default=None, help="names from the registry; default: all")
    parser.add_argument("--families", nargs="*", default=None, choices=list(FAMILIES), help="default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="measurements at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each measurement")


def models(parser: argparse.ArgumentParser, options: argparse.Namespace, *, but: Collection[str]) -> list[str]:
    """The names that were chosen; without a choice all of the registry ``but`` some."""
    entries = registry()
    chosen = options.families or FAMILIES
    names = options.models or [name for name, entry in entries.items() if entry.family in chosen and name not in but]
    if unknown := sorted(set(names) - set(entries)):
        parser.error(f"unknown models {unknown}; choose from {', '.join(entries)}")
    return list(names)


def begin(options: argparse.Namespace, **facts: Any) -> dict[str, Any]:
    """The body of the results: that of the file, if the run goes on, or an empty one."""
    options.results.parent.mkdir(parents=True, exist_ok=True)
    if options.resume and options.results.exists():
        body: dict[str, Any] = json.loads(options.results.read_text())
        return body
    return {"conditions": processor_record(), **facts, "seconds": 0.0, "measurements": {}}


def measure_all(
    command: str, settings: Sequence[Setting], body: dict[str, Any], results: Path, *,
    limit: Callable[[Any], float], jobs: int = 1,
) -> None:  # fmt: skip
    """Measure what the body lacks, ``jobs`` at a time, and write it to the file after each measurement."""
    found = body["measurements"]
    missing = [setting for setting in settings if setting.key not in found]
    start, before = time.perf_counter(), body["seconds"]
    columns = (TextColumn("{task.description:45}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("", total=len(settings), completed=len(settings) - len(missing))
        runs = {
            pool.submit(run_apart, command, asdict(each), limit=limit(each), threads=each.threads): each.key
            for each in missing
        }
        for run in as_completed(runs):
            found[runs[run]] = run.result()
            body["seconds"] = before + time.perf_counter() - start
            results.write_text(json.dumps(body, indent=1) + "\n")
            progress.update(task, advance=1, description=runs[run])
