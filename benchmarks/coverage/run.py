"""Which models can be pruned, proven for each, beside plain Torch-Pruning on the same models in the same run.

``python -m benchmarks coverage`` goes through the registry of :mod:`benchmarks.models`; every measurement runs in a
process of its own under a time limit. Results go to a JSON file after each model, the pages are written at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.processes import add_arguments, add_models, begin, measure_all, models
from benchmarks.coverage import sweep
from benchmarks.coverage.page import write_page
from benchmarks.models import registry

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
        from benchmarks.coverage.torch_pruning import judge

        return judge(model, entry.inputs(), ratio=RATIO)
    return _ours(model, entry.inputs(), entry.small())


def _ours(model: Any, x: Any, small: Any) -> dict[str, Any]:
    """All kinds of units, as the tracer understood them; where it misunderstood, what its check leaves."""
    import torch

    import etp_graph as etp
    from etp_graph.plan import ON_REQUEST
    from etp_graph.verification import random_selection

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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if "--sweep" in words:
        sweep.main([word for word in words if word != "--sweep"])
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks coverage", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="all that the libraries list instead; see --sweep --help")
    add_models(parser)
    parser.add_argument("--our-limit-seconds", type=float, default=600.0, help="for each of our measurements")
    add_arguments(parser, results=RESULTS, out=Path("docs/results/coverage.md"), limit=60.0)
    options = parser.parse_args(arguments)
    if options.one:
        sys.stdout.write(json.dumps(measure(Setting(**json.loads(options.one)))) + "\n")
        return
    names = models(parser, options, but=HUGE)
    todo = [Setting(probe=probe, model=name, threads=options.threads) for name in names for probe in PROBES]
    body = begin(options, limit_seconds=options.limit_seconds, jobs=options.jobs)

    def limit(setting: Setting) -> float:
        found = options.limit_seconds if setting.probe == "torch_pruning" else options.our_limit_seconds
        return float(found)

    measure_all("coverage", todo, body, options.results, limit=limit, jobs=options.jobs)
    write_page(body, options.out)
    sys.stderr.write(f"wrote {options.out} and {options.results}\n")
