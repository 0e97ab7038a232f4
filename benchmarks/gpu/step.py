"""Measure what the force adds to a training step, and whether it waits for the GPU.

``python -m benchmarks gpu-step`` trains a ResNet-56 on random images with and without a force, in turns, and writes a
JSON line: seconds of a step, whether a step with the force synchronises with the GPU, and whether a CUDA graph of it
can be captured. Without a GPU the last two are ``null``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import etp_graph as etp
from benchmarks.common.machine import commit, machine_conditions
from benchmarks.common.records import append_record
from etp_graph import methods
from etp_graph.demo.zoo.models import CifarResNet

RESULTS = Path("benchmarks/results/gpu-step.jsonl")
METHODS = ("etp", "etp-paper", "depgraph", "torque")


@dataclass(kw_only=True)
class Trained:
    """A network with its optimizer, and a force or none."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    regularizer: etp.Regularizer | None

    def step(self, x: Tensor, y: Tensor) -> None:
        """One training step in bfloat16 autocast."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(self.model(x), y)
        in_loss = self.regularizer is not None and self.regularizer.settings.mode == "loss"
        torch.autograd.backward(loss + self.regularizer.penalty() if in_loss else loss)  # type: ignore[union-attr]
        self.optimizer.step()


def trained(model: nn.Module, x: Tensor, name: str | None, steps: int) -> Trained:
    """A copy of the network under the force of a method."""
    own = copy.deepcopy(model)
    optimizer = torch.optim.SGD(own.parameters(), lr=1e-3, momentum=0.9)
    if name is None:
        return Trained(model=own, optimizer=optimizer, regularizer=None)
    method, plan = methods.get(name), etp.trace(own, x[:1], check=False)
    budget = etp.Budget(speed_up=2) if method.steered else None
    regularizer = method.regularizer(own, plan, steps=steps, budget=budget)
    assert regularizer is not None
    return Trained(model=own, optimizer=optimizer, regularizer=regularizer.attach(optimizer))


def seconds_of_steps(all_: dict[str, Trained], x: Tensor, y: Tensor, repetitions: int) -> dict[str, float]:
    """The median seconds of a step of each, in turns; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in all_}
    for repetition in range(repetitions + 1):
        for name, one in all_.items():
            _wait(x)
            begin = perf_counter()
            one.step(x, y)
            _wait(x)
            if repetition:
                found[name].append(perf_counter() - begin)
    return {name: median(seconds) for name, seconds in found.items()}


def waits_for_the_gpu(one: Trained, x: Tensor, y: Tensor) -> str | None:
    """What synchronises in a step, as PyTorch says it; empty: nothing; ``None``: there is no GPU."""
    if not x.is_cuda:
        return None
    one.step(x, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        return _error_of(lambda: one.step(x, y))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def refuses_a_graph(one: Trained, x: Tensor, y: Tensor) -> str | None:
    """Why a CUDA graph of a step cannot be captured; empty: it can; ``None``: there is no GPU."""
    if not x.is_cuda:
        return None
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            one.step(x, y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()

    def capture() -> None:
        with torch.cuda.graph(graph):
            one.step(x, y)

    return _error_of(capture)


def _error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def measure(*, depth: int, batch: int, repetitions: int) -> dict[str, Any]:
    """The line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = CifarResNet(depth).to(device, memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,), device=device)
    steps = 10 * repetitions + 100
    every = {"no force": trained(model, x, None, steps), **{name: trained(model, x, name, steps) for name in METHODS}}
    seconds = seconds_of_steps(every, x, y, repetitions)
    return {
        "config": {"depth": depth, "batch": batch, "repetitions": repetitions}, "seconds": seconds,
        "added": {name: seconds[name] / seconds["no force"] - 1 for name in METHODS},
        "waits": {name: waits_for_the_gpu(one, x, y) for name, one in every.items()},
        "graph": {name: refuses_a_graph(one, x, y) for name, one in every.items()},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "commit": commit(), "conditions": machine_conditions(),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu-step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=56, help="of the ResNet; default 56")
    parser.add_argument("--batch", type=int, default=128, help="images of a step; default 128")
    parser.add_argument("--repetitions", type=int, default=50, metavar="N", help="default 50")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON lines")
    options: Any = parser.parse_args(arguments)
    record = measure(depth=options.depth, batch=options.batch, repetitions=options.repetitions)
    append_record(options.results, record)
    console = Console(stderr=True)
    for name, added in record["added"].items():
        waits, graph = record["waits"][name], record["graph"][name]
        console.print(
            f"{name}: {added:+.1%} of a step; waits: {waits!r}; graph: {graph!r}", highlight=False, markup=False
        )


if __name__ == "__main__":
    main()
