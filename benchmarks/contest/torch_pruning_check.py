"""Whether Torch-Pruning prunes a task's network correctly: its surgery against the same network with zeros.

``python -m benchmarks torch-pruning-check TASK SCALE`` prints the verdict. The comparison runs it in a process of its
own under a time limit, since on some networks Torch-Pruning's walk never ends, and on others the result is silently
wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

SECONDS = 300.0
GIGABYTES = 6
"""How much memory the check may take: on some graphs Torch-Pruning takes all that there is."""


def verdict(task: str, scale: str) -> dict[str, Any]:
    """Measure in this process."""
    import torch

    from benchmarks.contest.torch_pruning import customized, heads, learning, resize_heads_
    from benchmarks.coverage.torch_pruning import judge
    from benchmarks.tasks import SCALES, make

    torch.manual_seed(0)
    chosen = make(task, next(known for known in SCALES if known == scale))
    model, example = chosen.build().eval(), chosen.example()
    pruners = customized(model, example)
    with learning(model):
        return judge(model, example, ratio=0.3, customized=pruners, heads=heads(model), resize=resize_heads_)


def limit_memory(gigabytes: float) -> None:
    """Let allocations of this process fail beyond a limit, where the system can (Linux).

    The limit is on data, not on addresses, of which PyTorch reserves many more than it uses.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard < 0 else min(wanted, hard), hard))


@cache
def impossible(task: str, scale: str, limit: float = SECONDS) -> str | None:
    """Why Torch-Pruning cannot prune the network of this task; ``None`` if its result is right."""
    command = [sys.executable, "-m", "benchmarks", "torch-pruning-check", task, scale]
    try:
        done = subprocess.run(  # noqa: S603 - this program itself
            command, check=False, capture_output=True, text=True, timeout=limit, env={**os.environ}
        )
    except subprocess.TimeoutExpired:
        return f"Torch-Pruning gives no answer in {limit:.0f} s"
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        if any(word in done.stderr[-2000:].lower() for word in ("memoryerror", "allocate memory", "bad_alloc")):
            return f"Torch-Pruning takes more than {GIGABYTES} GiB of memory"
        return f"Torch-Pruning raises {last[0]}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if found["verdict"] == "OK":
        return None
    error = f" (relative error {found['error']:.1g})" if "error" in found else ""
    return {
        "no group": "Torch-Pruning finds no group to prune",
        "wrong": f"Torch-Pruning's pruned network is not the masked one{error}",
    }[found["verdict"]]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks torch-pruning-check", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("task")
    parser.add_argument("scale")
    options = parser.parse_args(arguments)
    limit_memory(GIGABYTES)
    sys.stdout.write(json.dumps(verdict(options.task, options.scale)) + "\n")
