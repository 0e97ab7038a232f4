"""Speed-up in MACs against speed-up on the clock, and budgets in time: asked, predicted and measured.

``python -m benchmarks latency`` measures every model in a process of its own and writes
``benchmarks/results/latency-cpu.json`` and ``docs/results/latency.md``.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.processes import add_arguments, begin, measure_all
from benchmarks.latency.page import table, write_page

RESULTS = Path("benchmarks/results/latency-cpu.json")
MODELS = ("ResNet-50", "MobileNet-V3", "BERT-base", "ViT-B/16")
SPEED_UPS = (2.0, 4.0)
SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One model, on so many threads, with so many repetitions; ``small``: inputs that only try the command."""

    model: str
    threads: int
    repetitions: int
    small: bool = False

    @property
    def key(self) -> str:
        return f"{self.model}/{self.threads}"


def _image(name: str, setting: Setting) -> tuple[Any, Any]:
    import torch
    import torchvision

    kept = {"image_size": 64} if setting.small and name == "vit_b_16" else {}
    side = 64 if setting.small else 224
    return torchvision.models.get_model(name, **kept).eval(), torch.randn(1, 3, side, side)


def _bert(setting: Setting) -> tuple[Any, Any]:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(num_labels=2)).eval()
    return model, {"input_ids": torch.randint(1, 30_000, (1, 16 if setting.small else 128))}


BUILD: dict[str, Callable[[Setting], tuple[Any, Any]]] = {
    "ResNet-50": lambda setting: _image("resnet50", setting),
    "MobileNet-V3": lambda setting: _image("mobilenet_v3_large", setting),
    "BERT-base": _bert,
    "ViT-B/16": lambda setting: _image("vit_b_16", setting),
}


def measure(setting: Setting) -> dict[str, Any]:
    """All rows of one model, in this process: random weights, units chosen by their norms."""
    import torch

    import etp_graph as etp

    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    start = time.perf_counter()
    model, inputs = BUILD[setting.model](setting)
    plan = etp.trace(model, inputs, check=False)
    scores = etp.criteria.magnitude(model, plan)
    budgets = [etp.Budget(speed_up=speed_up) for speed_up in SPEED_UPS] + [etp.Budget(speed_up_latency=1 / SHARE)]
    found, models, said = [], [model], list[str]()
    for budget in budgets:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", etp.LatencyMissed)
            selection = etp.allocate(model, plan, scores, budget=budget, example_inputs=inputs)
        said += [str(one.message) for one in caught if issubclass(one.category, etp.LatencyMissed)]
        models.append(copy.deepcopy(model))
        etp.prune_(models[-1], plan, selection)
        fit = None if selection.latency is None else selection.latency.to_dict()
        macs = etp.cost(model, plan).macs / etp.cost(model, plan, selection).macs
        found.append({"budget": budget.as_given, "macs": macs, "fit": fit})
    dense, *pruned = etp.benchmark(models, inputs, repetitions=setting.repetitions)
    rows = [{**row, "p50_ms": own.p50_ms, "p90_ms": own.p90_ms} for row, own in zip(found, pruned, strict=True)]
    return {
        "dense": {"p50_ms": dense.p50_ms, "p90_ms": dense.p90_ms}, "rows": rows, "warnings": said,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks latency", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="*", default=[1])
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS, help="default: all")
    parser.add_argument("--small", action="store_true", help="small inputs, to try the command")
    add_arguments(parser, results=RESULTS, out=Path("docs/results/latency.md"), limit=1200.0)
    options = parser.parse_args(arguments)
    if options.one:
        sys.stdout.write(json.dumps(measure(Setting(**json.loads(options.one)))) + "\n")
        return
    todo = [
        Setting(model=model, threads=threads, repetitions=options.repetitions, small=options.small)
        for threads in options.threads for model in options.models
    ]  # fmt: skip
    body = begin(options, repetitions=options.repetitions, small=options.small)
    measure_all("latency", todo, body, options.results, limit=lambda _: float(options.limit_seconds))
    write_page(body, options.out)
    sys.stdout.write(table(body["measurements"]) + "\n")
    sys.stderr.write(f"wrote {options.out} and {options.results}\n")
