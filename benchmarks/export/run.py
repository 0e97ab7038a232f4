"""Which pruned models leave PyTorch: ``torch.export``, ``torch.compile``, and ONNX run by onnxruntime.

``python -m benchmarks export`` goes through the registry of :mod:`benchmarks.models`; every measurement runs in a
process of its own under a time limit. Where a pruned model cannot go, the dense one is tried, too: what neither can do
is the model's own limit. Results go to a JSON file after each measurement, the table is written at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

import etp_graph as etp
from benchmarks.common.processes import add_arguments, add_models, begin, measure_all, models
from benchmarks.export.page import passed, write_page
from benchmarks.models import Entry, registry
from etp_graph.model import run_model, tensors_of
from etp_graph.verification import random_selection, randomize_

RESULTS = Path("benchmarks/results/export.json")
RATIO = 0.4
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
    want = _floats(run_model(model, inputs))
    torch.manual_seed(0)
    got = _floats(WAYS[way](model, args, inputs if isinstance(inputs, dict) else {}))
    if [g.shape for g in got] != [w.shape for w in want]:
        return float("inf")
    scale = max(float(w.abs().max()) for w in want)
    return max(float((g - w).abs().max()) for g, w in zip(got, want, strict=True)) / scale


def _floats(out: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_of(out) if tensor.is_floating_point()]


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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks export", description=(__doc__ or "").splitlines()[0])
    add_models(parser)
    parser.add_argument("--ways", nargs="*", default=list(USUAL), choices=list(WAYS), help="where the models go")
    add_arguments(parser, results=RESULTS, out=Path("docs/results/export.md"), limit=600.0)
    options = parser.parse_args(arguments)
    if options.one:
        sys.excepthook = _briefly
        answer = measure(Setting(**json.loads(options.one)))
        sys.stdout.write("\n" + json.dumps(answer) + "\n")  # some exporters leave a line unfinished
        return
    body = begin(options)
    body["conditions"] |= {name: version(name) for name in ("onnxscript", "onnxruntime") if find_spec(name)}
    pairs = [(name, way) for name in models(parser, options, but=HUGE) for way in options.ways]
    for pruned in (True, False):  # the dense model where the pruned one fails
        todo = [Setting(model=name, way=way, pruned=pruned, threads=options.threads) for name, way in pairs]
        limit = float(options.limit_seconds)
        measure_all("export", todo, body, options.results, limit=lambda _, s=limit: s, jobs=options.jobs)  # type: ignore[misc]
        keys = (setting.key for setting in todo)
        pairs = [pair for pair, key in zip(pairs, keys, strict=True) if not passed(body["measurements"][key])]
    write_page(body, options.out)
    sys.stderr.write(f"wrote {options.out} and {options.results}\n")


def _briefly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What an exception goes back to, in one line: exporters wrap it in several, with advice of many lines."""
    while error.__cause__ is not None:
        error = error.__cause__
    sys.stderr.write(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}\n")
