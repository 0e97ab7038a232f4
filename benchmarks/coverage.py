"""Which models can be pruned, proven for each, beside plain Torch-Pruning on the same models in the same run.

``python -m benchmarks.coverage`` goes through the registry of :mod:`benchmarks.models`; every measurement runs in a
process of its own under a time limit. Results go to a JSON file after each model, the page is written at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .apart import conditions, run_apart
from .models import FAMILIES, registry

RESULTS = Path("benchmarks/results/coverage.json")
RATIO = 0.3
RATIOS = (0.3, 0.7)
HUGE = ("regnet_y_128gf", "vit_h_14")
"""Left out unless named: four copies of more than 600 million weights in float64 need 20 GB."""
PROBES = ("ours", "torch_pruning")
"""What is measured for each model, each in a process of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One measurement: what, of which model, on how many threads."""

    probe: str
    model: str
    threads: int

    @property
    def key(self) -> str:
        return f"{self.model}/{self.probe}"


def measure(setting: Setting) -> dict[str, Any]:
    """Run one measurement in this process."""
    import torch

    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    entry = registry()[setting.model]
    model = entry.build()
    if setting.probe == "torch_pruning":
        from .coverage_peer import judge

        return judge(model, entry.inputs(), ratio=RATIO)
    return _ours(model, entry.inputs(), entry.small())


def _ours(model: Any, x: Any, small: Any) -> dict[str, Any]:
    """All kinds of units, as the tracer understood them; where it misunderstood, what its check leaves."""
    import torch

    import etp_graph as etp
    from etp_graph.facets import ON_REQUEST
    from etp_graph.sampling import random_selection

    start = time.perf_counter()
    plan = etp.trace(model, x, prune="all", check=False)
    traced = time.perf_counter()
    refuted: dict[str, str] = {}
    try:
        found = _verify(model, plan, x, small)
    except etp.EquivalenceError:
        checked = etp.trace(model, x, prune="all", check=True)
        refuted = {g.name: g.locked for g in checked.groups if g.locked and plan[g.name].locked is None}
        plan = checked
        found = _verify(model, plan, x, small)
    done = time.perf_counter()
    usual = [group for group in plan.prunable if group.kind not in ON_REQUEST]
    selection = random_selection(plan, usual, RATIO, torch.Generator().manual_seed(0))
    dense, sparse = etp.cost(model, plan), etp.cost(model, plan, selection)
    etp.prune_(model, plan, selection)
    assert sum(p.numel() for p in model.parameters()) == sparse.params
    return {
        "groups": len(plan.groups), "units": plan.n_units, "kinds": _kinds(plan), "refuted": refuted,
        "locked": sorted({str(g.locked) for g in plan.groups if g.locked}),
        "params": dense.params, "params_after": sparse.params, "macs": dense.macs, "macs_after": sparse.macs,
        "trace_seconds": traced - start, "verify_seconds": done - traced, **found,
    }  # fmt: skip


def _kinds(plan: Any) -> dict[str, list[int]]:
    """Kind -> number of prunable and of locked groups."""
    found: dict[str, list[int]] = {}
    for group in plan.groups:
        found.setdefault(group.kind, [0, 0])[group.locked is not None] += 1
    return found


def _verify(model: Any, plan: Any, x: Any, small: Any) -> dict[str, Any]:
    """Largest errors of outputs on the inputs, and of gradients on the small ones."""
    import etp_graph as etp

    alike = _shapes(x) == _shapes(small)
    full = etp.verify(model, plan, x, ratio=RATIOS, gradients=alike)
    grad = full if alike else etp.verify(model, etp.trace(model, small, prune="all"), small, ratio=RATIOS)
    return {
        "error": full.error, "gradient_error": grad.gradient_error, "dtype": full.dtype, "input": _shapes(x),
        "small": None if alike else _shapes(small),
    }  # fmt: skip


def _shapes(x: Any) -> str:
    """The shapes of all tensors in the inputs."""
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    return ", ".join("x".join(map(str, t.shape)) for t in tree_leaves(x) if isinstance(t, Tensor))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=None, help="names from the registry; default: all")
    parser.add_argument("--families", nargs="*", default=None, choices=list(FAMILIES), help="default: all")
    parser.add_argument("--out", type=Path, default=Path("docs/coverage.md"), help="the page")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the measurements, as JSON")
    parser.add_argument("--limit-seconds", type=float, default=60.0, help="for Torch-Pruning, each model")
    parser.add_argument("--our-limit-seconds", type=float, default=600.0, help="for each of our measurements")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="measurements at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each measurement")
    parser.add_argument("--resume", action="store_true", help="keep what the JSON file has")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(measure(Setting(**json.loads(options.one)))) + "\n")
        return
    entries = registry()
    chosen = options.families or FAMILIES
    names = options.models or [name for name, entry in entries.items() if entry.family in chosen and name not in HUGE]
    unknown = sorted(set(names) - set(entries))
    if unknown:
        parser.error(f"unknown models {unknown}; choose from {', '.join(entries)}")
    measurements = [Setting(probe=probe, model=name, threads=options.threads) for name in names for probe in PROBES]
    _measure_all(measurements, options)


def _measure_all(todo: list[Setting], options: argparse.Namespace) -> None:
    from .coverage_page import write_page

    found: dict[str, Any] = {}
    body = {"conditions": conditions(), "limit_seconds": options.limit_seconds, "jobs": options.jobs, "seconds": 0.0}
    if options.resume and options.results.exists():
        body = json.loads(options.results.read_text())
        found = body["measurements"]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description:30}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    missing = [setting for setting in todo if setting.key not in found]
    start, before = time.perf_counter(), body["seconds"]
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(options.jobs) as pool:
        task = progress.add_task("", total=len(todo), completed=len(todo) - len(missing))
        runs = {pool.submit(_apart, setting, options): setting for setting in missing}
        for run in as_completed(runs):
            found[runs[run].key] = run.result()
            body |= {"measurements": found, "seconds": before + time.perf_counter() - start}
            options.results.write_text(json.dumps(body, indent=1) + "\n")
            progress.update(task, advance=1, description=runs[run].key)
    if found:
        write_page(body | {"measurements": found}, options.out)
        console.print(f"wrote {options.out} and {options.results}")


def _apart(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    limit = options.limit_seconds if setting.probe == "torch_pruning" else options.our_limit_seconds
    return run_apart("benchmarks.coverage", asdict(setting), limit=limit, threads=setting.threads)


if __name__ == "__main__":
    main()
