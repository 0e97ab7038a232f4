"""Measure what the check of a trace costs on models of the registry, in forwards of the dense model.

``python -m benchmarks speed --check`` takes a sample of the registry: every seventh model, in its order. Each model has
a process of its own and one thread. Times are those of the processor. Each result is one JSON line, so an interrupted
run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.processes import processor_record, run_apart
from benchmarks.common.records import append_record, read_records
from benchmarks.models import registry
from benchmarks.speed.check_page import write_check_page

RESULTS = Path("benchmarks/results/check-cost.jsonl")
PAGE = Path("docs/results/check-cost.md")
STEP = 7
"""Every how many-th model of the registry is measured."""


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks speed --check", description=__doc__)
    parser.add_argument("--models", nargs="*", default=None, help="names from the registry; default: the sample")
    parser.add_argument("--repetitions", type=int, default=3, help="of each action; medians are kept")
    parser.add_argument("--limit-seconds", type=float, default=300.0, help="for each model")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the measurements, as JSON lines")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page")
    options = parser.parse_args(arguments)
    entries = registry()
    if unknown := sorted(set(options.models or ()) - set(entries)):
        parser.error(f"unknown models {unknown}; choose from {', '.join(entries)}")
    found = {line["model"] for line in read_records(options.results)}
    todo = options.models or [name for name in sample(list(entries)) if name not in found]
    for number, name in enumerate(todo, start=1):
        payload = {"probe": "check", "model": name, "threads": 1, "repetitions": options.repetitions}
        answer = run_apart("speed", payload, limit=options.limit_seconds, threads=1)
        line = {"model": name, "family": entries[name].family, **answer, "conditions": processor_record()}
        append_record(options.results, line)
        sys.stderr.write(f"{number}/{len(todo)} {name}: {answer.get('verdict', 'measured')}\n")
    write_check_page(read_records(options.results), options.out)
    sys.stderr.write(f"wrote {options.out} and {options.results}\n")


def sample(names: Sequence[str]) -> list[str]:
    """Return every seventh name, from the first on."""
    return list(names[::STEP])
