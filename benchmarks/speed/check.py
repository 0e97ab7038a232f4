"""Measure what the check of a trace costs on models of the registry, in forwards of the dense model.

``python -m benchmarks speed --check`` takes a sample of the registry: every seventh model, in random order. Each model
has one thread and a process of its own, forked from this one, which has imported the libraries. Times are those of the
processor. Each result is one JSON line, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.processes import processor_record
from benchmarks.common.records import append_record, read_records
from benchmarks.models import registry
from benchmarks.speed import probes
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
    parser.add_argument("--limit-seconds", type=float, default=600.0, help="for each model")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the measurements, as JSON lines")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page")
    options = parser.parse_args(arguments)
    entries = registry()
    if unknown := sorted(set(options.models or ()) - set(entries)):
        parser.error(f"unknown models {unknown}; choose from {', '.join(entries)}")
    found = {line["model"] for line in read_records(options.results)}
    todo = options.models or [name for name in sample(list(entries)) if name not in found]
    torch.set_num_threads(1)
    for number, name in enumerate(todo, start=1):
        answer = run_forked(name, options.repetitions, limit=options.limit_seconds)
        line = {"model": name, "family": entries[name].family, **answer, "conditions": processor_record()}
        append_record(options.results, line)
        sys.stderr.write(f"{number}/{len(todo)} {name}: {answer.get('verdict', 'measured')}\n")
    write_check_page(read_records(options.results), options.out, listed=sample(list(entries)))
    sys.stderr.write(f"wrote {options.out} and {options.results}\n")


def sample(names: Sequence[str]) -> list[str]:
    """Return every seventh name in random order, so that a run that was interrupted has a fair sample, too."""
    found = list(names[::STEP])
    random.Random(0).shuffle(found)
    return found


def run_forked(name: str, repetitions: int, *, limit: float) -> dict[str, Any]:
    """Return what the probe finds in a process of its own, or a verdict why it found nothing."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_measurement, args=(sender, name, repetitions))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            return {"verdict": f"no answer in {limit:.0f} s"}
        found: dict[str, Any] = receiver.recv()
    except EOFError:
        return {"verdict": "the process died"}
    finally:
        process.kill()
        process.join()
    return found


def _send_measurement(sender: Connection, name: str, repetitions: int) -> None:
    torch.manual_seed(0)
    try:
        found = probes.check(name, repetitions)
    except Exception as error:  # noqa: BLE001 - whatever a user would see is the result
        found = {"verdict": f"exception: {error!r:.200}"}
    sender.send({what: probes.spread(value) if isinstance(value, list) else value for what, value in found.items()})
