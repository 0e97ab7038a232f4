"""What a network costs and how fast it is, counted alike for all methods."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import etp_graph as etp
from benchmarks.tasks.base import Task
from etp_graph.model import run_model

LIBRARIES = ("torch", "torch-pruning", "transformers", "torch-geometric", "numpy")


def flops(model: nn.Module, example: Any) -> int:
    """Multiply-adds of all matrix products and convolutions, as PyTorch's own counter sees them."""
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run_model(model, example)
    return int(counter.get_total_flops()) // 2


class Counter:
    """Counts MACs. PyTorch's counter, which trusts neither library, where it counts all of the dense network.

    It knows no recurrent layers and no message passing. Where it disagrees with :func:`etp_graph.cost`
    on the dense network, all networks of the task are counted by the latter.
    """

    def __init__(self, task: Task, dense: nn.Module, plan: etp.Plan) -> None:
        self.task = task
        self.example = task.example()
        self.neutral = flops(dense, self.example) == etp.cost(dense, plan).macs

    @property
    def by(self) -> str:
        """What counts."""
        return "torch.utils.flop_counter" if self.neutral else "etp_graph.cost"

    def __call__(self, model: nn.Module) -> int:
        """MACs of one forward with the example inputs."""
        if self.neutral:
            return flops(model, self.example)
        model.eval()
        return etp.cost(model, etp.trace(model, self.example, prune="all", check=False)).macs


@torch.no_grad()
def p50_latencies(models: Sequence[nn.Module], inputs: Any, *, rounds: int) -> list[float]:
    """Median seconds of a forward of each model; they take turns, so that a busy machine slows all alike."""
    seconds: list[list[float]] = [[] for _ in models]
    for number in range(rounds + 3):
        for model, own in zip(models, seconds, strict=True):
            model.eval()
            start = perf_counter()
            run_model(model, inputs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 3:  # the first rounds fill caches
                own.append(perf_counter() - start)
    return [statistics.median(own) for own in seconds]


def parameters(model: nn.Module) -> int:
    """Numbers in the parameters; a tied one counts once."""
    return sum(p.numel() for p in model.parameters())


def nonzero(model: nn.Module) -> int:
    """Numbers in the parameters that are not zero."""
    return sum(int(p.count_nonzero()) for p in model.parameters())


def conditions() -> dict[str, str]:
    """Versions and hardware."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "etp-graph": etp.__version__, **{name: _version(name) for name in LIBRARIES},
        "python": platform.python_version(), "device": device, "cpus": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }  # fmt: skip


def commit() -> str:
    """The commit of the sources, with ``+`` where files were changed since; ``unknown`` outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(  # noqa: S603 - git with fixed words
            ["git", *words],  # noqa: S607 - whichever git the user has
            cwd=here,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    found = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!results", ":!../docs/results")
    return f"{found}{'+' if changed else ''}" if found else "unknown"


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
