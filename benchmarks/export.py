"""Which pruned models leave PyTorch: ``torch.export``, ``torch.compile``, and ONNX run by onnxruntime.

``python -m benchmarks.export`` goes through the registry of :mod:`benchmarks.models`; every measurement runs in a
process of its own under a time limit. Where a pruned model cannot go, the dense one is tried, too: what neither can do
is the model's own limit. Results go to a JSON file after each measurement, the table is written at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.forward import outputs, run
from etp_graph.sampling import random_selection, randomize_

from .apart import conditions, run_apart
from .models import FAMILIES, Entry, registry

RESULTS = Path("benchmarks/results/export.json")
RATIO = 0.4
TOLERANCE = 1e-5
"""Of the largest difference over the largest output of the eager model."""
HUGE = ("regnet_y_128gf", "vit_h_14")
"""Left out unless named: the ONNX file and its optimiser hold several copies of the weights."""


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return torch.export.export(model, args, kwargs).module()(*args, **kwargs)


def _compiled(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], backend: str = "aot_eager") -> Any:
    torch.compiler.reset()
    return torch.compile(model, backend=backend)(*args, **kwargs)


def _inductor(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _compiled(model, args, kwargs, "inductor")


def _onnx(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    program = torch.onnx.export(model, args, kwargs=kwargs, dynamo=True, verbose=False)
    assert program is not None
    return program(*args, **kwargs)  # by onnxruntime


WAYS: dict[str, Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]] = {
    "export": _exported,
    "compile": _compiled,
    "onnx": _onnx,
    "inductor": _inductor,
}
"""What a model can be given to: a function of the model and its inputs that returns its outputs."""
USUAL = ("export", "compile", "onnx")
"""Those of the table; the compilation to machine code takes a minute for each model."""


@torch.no_grad()
def difference(model: nn.Module, inputs: Any, way: str) -> float:
    """Largest difference of an output from the eager model's, over the largest output.

    Raises:
        Exception: whatever the exporter raises.
    """
    args = () if isinstance(inputs, dict) else tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    torch.manual_seed(0)  # some architectures sample in eval mode, too
    want = _floats(run(model, inputs))
    torch.manual_seed(0)
    got = _floats(WAYS[way](model, args, inputs if isinstance(inputs, dict) else {}))
    if [g.shape for g in got] != [w.shape for w in want]:
        return float("inf")
    scale = max(float(w.abs().max()) for w in want)
    return max(float((g - w).abs().max()) for g, w in zip(got, want, strict=True)) / scale


def _floats(out: Any) -> list[Tensor]:
    return [tensor for tensor in outputs(out) if tensor.is_floating_point()]


def network(entry: Entry, *, pruned: bool) -> nn.Module:
    """The model of an entry with random weights; ``pruned``: without 40 % of the units, on average, of every kind."""
    torch.manual_seed(0)
    model = entry.build()
    randomize_(model)  # a head that its authors initialise with zeros would hide every difference
    if pruned:
        plan = etp.trace(model, entry.small(), prune="all")
        etp.prune_(model, plan, random_selection(plan, plan.prunable, RATIO, torch.Generator().manual_seed(0)))
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One measurement: where which model goes, on how many threads."""

    model: str
    way: str
    pruned: bool
    threads: int

    @property
    def key(self) -> str:
        return f"{self.model}/{self.way}/{'pruned' if self.pruned else 'dense'}"


def measure(setting: Setting) -> dict[str, Any]:
    """Run one measurement in this process."""
    torch.set_num_threads(setting.threads)
    entry = registry()[setting.model]
    return {"error": difference(network(entry, pruned=setting.pruned), entry.small(), setting.way)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=None, help="names from the registry; default: all")
    parser.add_argument("--families", nargs="*", default=None, choices=list(FAMILIES), help="default: all")
    parser.add_argument("--ways", nargs="*", default=list(USUAL), choices=list(WAYS), help="where the models go")
    parser.add_argument("--out", type=Path, default=Path("docs/export.md"), help="the page whose table is written")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the measurements, as JSON")
    parser.add_argument("--limit-seconds", type=float, default=600.0, help="for each measurement")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="measurements at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each measurement")
    parser.add_argument("--resume", action="store_true", help="keep what the JSON file has")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sys.excepthook = _briefly
        answer = measure(Setting(**json.loads(options.one)))
        sys.stdout.write("\n" + json.dumps(answer) + "\n")  # some exporters leave a line unfinished
        return
    entries = registry()
    chosen = options.families or FAMILIES
    names = options.models or [name for name, entry in entries.items() if entry.family in chosen and name not in HUGE]
    if unknown := sorted(set(names) - set(entries)):
        parser.error(f"unknown models {unknown}; choose from {', '.join(entries)}")
    _measure_all(names, options)


def _briefly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What an exception goes back to, in one line: exporters wrap it in several, with advice of many lines."""
    while error.__cause__ is not None:
        error = error.__cause__
    sys.stderr.write(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}\n")


def _measure_all(names: list[str], options: argparse.Namespace) -> None:
    from .export_page import write_page

    converters = {name: version(name) for name in ("onnxscript", "onnxruntime") if find_spec(name)}
    body: dict[str, Any] = {"conditions": conditions() | converters, "measurements": {}}
    if options.resume and options.results.exists():
        body = json.loads(options.results.read_text())
    found = body["measurements"]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    todo = [(name, way) for name in names for way in options.ways]
    columns = (TextColumn("{task.description:30}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(options.jobs) as pool:
        task = progress.add_task("", total=len(todo))
        runs = {pool.submit(_pair, name, way, dict(found), options): name for name, way in todo}
        for each in as_completed(runs):
            found |= each.result()
            options.results.write_text(json.dumps(body, indent=1) + "\n")
            progress.update(task, advance=1, description=runs[each])
    write_page(body, options.out)
    console.print(f"wrote {options.out} and {options.results}")


def _pair(name: str, way: str, known: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The pruned model, and the dense one where the pruned one fails."""
    found: dict[str, Any] = {}
    for pruned in (True, False):
        setting = Setting(model=name, way=way, pruned=pruned, threads=options.threads)
        if setting.key not in known:
            answer = run_apart(
                "benchmarks.export", asdict(setting), limit=options.limit_seconds, threads=options.threads
            )
            found[setting.key] = answer
        if passed((found | known)[setting.key]):
            break
    return found


def passed(answer: dict[str, Any]) -> bool:
    """Whether the model went there and computes the same."""
    return bool(answer.get("error", float("inf")) <= TOLERANCE)


if __name__ == "__main__":
    main()
