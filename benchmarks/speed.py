"""What the library costs, as ratios: against the model's own step, Torch-Pruning and the physical limit.

``python -m benchmarks.speed`` measures everything, each in a process of its own, prints the table of targets and writes
``benchmarks/results/speed-cpu.json`` and ``docs/speed.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .apart import conditions, run_apart

RESULTS = Path("benchmarks/results/speed-cpu.json")
STEPS = ("ResNet-56, batch 128 at 32", "ResNet-50, batch 8 at 224", "ViT-B/16, batch 4", "BERT-base, 8 x 64 tokens")
PLANS = ("Llama-like, 8 layers", "Llama-like, 32 layers", "Llama-like, 128 layers", "DenseNet-201", "ViT-L/16")
CUTS = ("Llama-like, 32 layers", "DenseNet-201", "ViT-L/16")
PROBES = {
    "force": STEPS, "force_peer": STEPS, "trace": PLANS, "trace_peer": PLANS, "surgery": CUTS, "surgery_peer": CUTS[1:],
    "meta": ("Llama, 6.7 billion parameters",),
}  # fmt: skip


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

    from . import speed_probes

    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    found: dict[str, Any] = getattr(speed_probes, setting.probe)(setting.model, setting.repetitions)
    return {k: speed_probes.spread(v) if isinstance(v, list) else v for k, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="targets are for one")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--limit-seconds", type=float, default=300.0, help="for each measurement")
    parser.add_argument("--probes", nargs="*", default=list(PROBES), choices=list(PROBES), help="default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the measurements, as JSON")
    parser.add_argument("--out", type=Path, default=Path("docs/speed.md"), help="the page")
    parser.add_argument("--resume", action="store_true", help="keep what the JSON file has")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(measure(Setting(**json.loads(options.one)))) + "\n")
        return
    _measure_all(options)


def _measure_all(options: argparse.Namespace) -> None:
    from .speed_page import table, write_page

    body: dict[str, Any] = {"conditions": conditions(), "repetitions": options.repetitions, "seconds": 0.0}
    found: dict[str, Any] = {}
    if options.resume and options.results.exists():
        body = json.loads(options.results.read_text())
        found = body["measurements"]
    todo = [
        Setting(probe=probe, model=model, threads=threads, repetitions=options.repetitions)
        for threads in options.threads for probe in options.probes for model in PROBES[probe]
    ]  # fmt: skip
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:45}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    start, before = time.perf_counter(), body["seconds"]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(todo))
        for setting in todo:
            progress.update(task, description=setting.key)
            if setting.key not in found:
                limit = options.limit_seconds
                found[setting.key] = run_apart(
                    "benchmarks.speed", asdict(setting), limit=limit, threads=setting.threads
                )
            body |= {"measurements": found, "seconds": before + time.perf_counter() - start}
            options.results.write_text(json.dumps(body, indent=1) + "\n")
            progress.advance(task)
    write_page(body, options.out)
    sys.stdout.write(table(found) + "\n")
    console.print(f"wrote {options.out} and {options.results}")


if __name__ == "__main__":
    main()
