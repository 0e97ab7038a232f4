"""Describe a network and the conditions of a run: numbers, seconds of a forward, machine, state of the sources."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import etp_graph as etp
from etp_graph.demo.zoo.machine import machine_record

LIBRARIES = ("torch", "torch-pruning", "transformers", "torch-geometric", "numpy")


_RESULTS = (":(top,exclude)benchmarks/results", ":(top,exclude)docs/results")
"""Files that a run writes itself; they are no part of the sources."""


def parameters(model: nn.Module) -> int:
    """Return the number of entries of the parameters; a tied one counts once."""
    return sum(p.numel() for p in model.parameters())


def nonzero(model: nn.Module) -> int:
    """Return the number of entries of the parameters that are not zero."""
    return sum(int(p.count_nonzero()) for p in model.parameters())


def median_seconds(models: Sequence[nn.Module], inputs: Any, *, repetitions: int) -> list[float]:
    """Return the median seconds of a forward of each model; the models take turns."""
    found = etp.benchmark(models, inputs, repetitions=repetitions, warm_up=3)
    return [one.p50_ms / 1e3 for one in found]


def machine_conditions() -> dict[str, str]:
    """Return versions, hardware and the number of threads."""
    return {**machine_record(LIBRARIES), "threads": str(torch.get_num_threads())}


@cache
def sources_digest() -> str:
    """Return the SHA-256 of all Python files of the library and of the benchmarks, as they were at the first call."""
    digest = hashlib.sha256()
    for root in (Path(etp.__file__).parent, Path(__file__).parents[1]):
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def commit() -> str:
    """Return the commit of the sources, with ``+`` where files were changed since; ``unknown`` outside a checkout."""
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
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *_RESULTS)
    return f"{found}{'+' if changed else ''}" if found else "unknown"
