"""Several processes for a test, which never wait for ever."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=90)
"""A process that waits longer for another one fails."""
_LIMIT = 240.0
_PRELOAD = [
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "transformers",
    "tests.support.fsdp_worker",
]


def spawn(work: Callable[..., None], size: int, *arguments: Any) -> None:
    """Run ``work(rank, size, *arguments)`` in so many processes; raise if one fails or all take too long."""
    method = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
    if method == "forkserver":
        mp.get_context(method).set_forkserver_preload(_PRELOAD)
    running = mp.start_processes(work, (size, *arguments), nprocs=size, join=False, start_method=method)
    assert running is not None
    end = time.monotonic() + _LIMIT
    while not running.join(timeout=1):
        if time.monotonic() > end:
            for process in running.processes:
                process.kill()
            raise TimeoutError(f"{size} processes did not finish within {_LIMIT} s")


def join_group(rank: int, size: int, store: Path, timeout: timedelta = TIMEOUT) -> None:
    """One thread, and the group of all processes of a test."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
