"""Compare both sources of plans: labels that travel through the forward, and Torch-Pruning's dependency graph.

``python -m benchmarks graph-sources`` traces each model with ``graph="labels"`` and ``graph="torch-pruning"``, each
in a process of its own, with the same check of the groups. It writes ``docs/results/graph-sources.md``.
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
from benchmarks.graph_sources.page import SOURCES, write_page
from benchmarks.models import registry

RESULTS = Path("benchmarks/results/graph-sources.json")
MODELS = (
    "cifar_resnet56", "cifar_vgg19_bn", "resnet18", "mobilenet_v2", "hf:bert", "hf:roberta", "hf:distilbert", "hf:gpt2",
    "hf:llama_gqa", "hf:t5_gated", "informer", "pyg:gat2", "rnn:lstm_lm",
)  # fmt: skip
"""Models of the papers and of the families that users prune most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One trace: of which model, from which source, on how many threads."""

    model: str
    source: str
    threads: int

    @property
    def key(self) -> str:
        return f"{self.model}/{self.source}"


def measure(setting: Setting) -> dict[str, Any]:
    """Trace the model without and with the check, in this process. Seconds are those of the processor."""
    import torch

    import etp_graph as etp

    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    entry = registry()[setting.model]
    model, x = entry.build(), entry.inputs()
    start = time.process_time()
    found = etp.trace(model, x, prune="all", check=False, graph=setting.source)
    traced = time.process_time()
    plan = etp.trace(model, x, prune="all", check=True, graph=setting.source)
    return {
        "groups": len(plan.groups), "prunable": len(plan.prunable), "refuted": len(found.prunable) - len(plan.prunable),
        "units": sum(group.n_units for group in plan.prunable), "share": removable_share(plan),
        "seconds": traced - start, "kinds": sorted({group.kind for group in plan.prunable}),
    }  # fmt: skip


def removable_share(plan: Any) -> float:
    """Return the share of the parameters that is left out if every prunable group keeps its minimum of units."""
    import torch

    from etp_graph.plan import CostModel

    keep = torch.ones(plan.n_units, dtype=torch.bool)
    for group, span in plan.spans():
        if group.locked is None:
            least = max(group.min_units, group.multiple)
            least += -least % group.multiple
            keep[span.start + least : span.stop] = False
    return 1 - CostModel(plan).evaluate(keep).params / plan.dense.params


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks graph-sources", description=__doc__.splitlines()[0])
    add_models(parser)
    add_arguments(parser, results=RESULTS, out=Path("docs/results/graph-sources.md"), limit=300.0)
    options = parser.parse_args(arguments)
    if options.one:
        sys.stdout.write(json.dumps(measure(Setting(**json.loads(options.one)))) + "\n")
        return
    names = models(parser, options, but=()) if options.models or options.families else list(MODELS)
    todo = [Setting(model=name, source=source, threads=options.threads) for name in names for source in SOURCES]
    body = begin(options, limit_seconds=options.limit_seconds, jobs=options.jobs)
    limit = float(options.limit_seconds)
    measure_all("graph-sources", todo, body, options.results, limit=lambda _: limit, jobs=options.jobs)
    write_page(body, options.out)
    sys.stderr.write(f"wrote {options.out} and {options.results}\n")
