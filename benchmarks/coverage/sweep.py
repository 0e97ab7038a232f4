"""Check the plans of models that nobody chose by hand: all that the libraries list.

``python -m benchmarks coverage --sweep`` enumerates the models of :mod:`benchmarks.coverage.sources`. Every model is
built, traced with the default call, and verified in a process of its own, with limits of time and memory. Each result
is one JSON line, written as soon as it is there, so an interrupted sweep goes on where it stopped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.records import append_record, read_records
from benchmarks.coverage.measure import measure_into
from benchmarks.coverage.sources import SOURCES, Case, cases
from benchmarks.coverage.sweep_page import write_sweep_page

RESULTS = Path("benchmarks/results/coverage-sweep.jsonl")
PAGE = Path("docs/results/coverage-sweep.md")


def main(arguments: Sequence[str]) -> None:
    """Run the command line of the sweep."""
    options = _parse(arguments)
    latest = {line["key"]: line["outcome"] for line in read_records(options.results)}
    listed = [case for case in cases(_wanted_sources(options)) if not options.models or case.key in options.models]
    todo = [case for case in listed if latest.get(case.key) in (None, *options.again) or options.models]
    todo = in_order(todo, read_records(options.results))
    sys.stderr.write(f"{len(listed)} models are listed, {len(todo)} are to be measured\n")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.coverage.measure"])
    for number, case in enumerate(todo, start=1):
        line = run_apart(context, case, seconds=options.limit_seconds, gibibytes=options.limit_gib)
        append_record(options.results, line)
        sys.stderr.write(f"{number}/{len(todo)} {case.key}: {line['outcome']}, {line['seconds']:.1f} s\n")
    write_sweep_page(read_records(options.results), options.out)
    sys.stderr.write(f"wrote {options.out} and {options.results}\n")


def in_order(cases: Sequence[Case], lines: Iterable[Mapping[str, Any]] = ()) -> list[Case]:
    """Return the cases in the order of the sweep: new families first, then those that take the least time per result.

    The order within a family is random, so that an interrupted sweep has a fair sample of each. A model that cannot be
    built takes time, too, and gives no result.

    Args:
        cases: what is to be measured.
        lines: what was measured.
    """
    seen: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        seen.setdefault(line["family"], []).append(line)
    cost = {
        family: median(line["seconds"] for line in found)
        * len(found) / max(0.5, sum(line["outcome"] != "not built" for line in found))
        for family, found in seen.items()
    }  # fmt: skip
    shuffled = list(cases)
    random.Random(0).shuffle(shuffled)
    first = {case.family: case for case in reversed(shuffled) if case.family not in seen}
    rest = [case for case in shuffled if first.get(case.family) is not case]
    return [*first.values(), *sorted(rest, key=lambda case: cost.get(case.family, inf))]


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks coverage --sweep", description=__doc__)
    parser.add_argument("--sources", nargs="*", default=SOURCES, choices=SOURCES, help="default: all")
    parser.add_argument("--models", nargs="*", default=(), help="measure these again, as SOURCE:NAME; default: all new")
    parser.add_argument("--again", nargs="*", default=(), help="outcomes to measure again, such as exception")
    parser.add_argument("--limit-seconds", type=float, default=180.0, help="for each model")
    parser.add_argument("--limit-gib", type=float, default=6.0, help="memory of each model")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the measurements, one JSON line for each model")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page")
    return parser.parse_args(arguments)


def _wanted_sources(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the sources of the models that were named, or those that were chosen."""
    return tuple(dict.fromkeys(key.partition(":")[0] for key in options.models)) or tuple(options.sources)


def run_apart(context: ForkServerContext, case: Case, *, seconds: float, gibibytes: float) -> dict[str, Any]:
    """Return the line of a model, measured in a process of its own.

    The process is forked from one that has imported the libraries, which saves half of the time. A process that ends
    without an answer (killed, out of memory) or exceeds the limit has a line that says so.
    """
    start = time.perf_counter()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure_into, args=(sender, case, gibibytes), daemon=True)
    process.start()
    sender.close()
    line = _answer(receiver, seconds)
    if line is None:
        late = process.is_alive() and time.perf_counter() - start >= seconds
        line = {"outcome": "time" if late else "killed", "message": f"no answer in {seconds:.0f} s" if late else ""}
    process.join(timeout=5 if process.is_alive() else None)
    if process.is_alive():
        process.kill()
        process.join()
    return {"key": case.key, "family": case.family, **line, "seconds": round(time.perf_counter() - start, 2)}


def _answer(receiver: Connection, seconds: float) -> dict[str, Any] | None:
    """Return what the process sends in this time; ``None`` if it sends nothing."""
    try:
        return dict(receiver.recv()) if receiver.poll(seconds) else None
    except EOFError:
        return None
    finally:
        receiver.close()
