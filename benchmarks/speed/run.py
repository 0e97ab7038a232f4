"""What the library costs, as ratios: against the model's own step, Torch-Pruning and the physical limit.

``python -m benchmarks speed`` measures everything, each in a process of its own, prints the table of targets and writes
``benchmarks/results/speed-cpu.json`` and ``docs/results/speed.md``. ``--check`` measures the check of a trace instead,
see :mod:`benchmarks.speed.check`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.processes import add_arguments, begin, measure_all
from benchmarks.speed import check
from benchmarks.speed.page import table, write_page
from benchmarks.speed.settings import PROBES

RESULTS = Path("benchmarks/results/speed-cpu.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One measurement: what, of which model, on how many threads, how often."""

    probe: str
    model: str
    threads: int
    repetitions: int

    @property
    def key(self) -> str:
        return f"{self.probe}/{self.model}/{self.threads}"


def measure(setting: Setting) -> dict[str, Any]:
    """Run one measurement in this process."""
    import torch

    from benchmarks.speed import probes as speed_probes

    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    found: dict[str, Any] = getattr(speed_probes, setting.probe)(setting.model, setting.repetitions)
    return {k: speed_probes.spread(v) if isinstance(v, list) else v for k, v in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if "--check" in words:
        check.main([word for word in words if word != "--check"])
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks speed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="measure the check of a trace; see --check --help")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="targets are for one")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--probes", nargs="*", default=list(PROBES), choices=list(PROBES), help="default: all")
    add_arguments(parser, results=RESULTS, out=Path("docs/results/speed.md"), limit=300.0)
    options = parser.parse_args(arguments)
    if options.one:
        sys.stdout.write(json.dumps(measure(Setting(**json.loads(options.one)))) + "\n")
        return
    todo = [
        Setting(probe=probe, model=model, threads=threads, repetitions=options.repetitions)
        for threads in options.threads for probe in options.probes for model in PROBES[probe]
    ]  # fmt: skip
    body = begin(options, repetitions=options.repetitions)
    measure_all("speed", todo, body, options.results, limit=lambda _: float(options.limit_seconds))
    write_page(body, options.out)
    sys.stdout.write(table(body["measurements"]) + "\n")
    sys.stderr.write(f"wrote {options.out} and {options.results}\n")
