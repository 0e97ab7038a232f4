"""What one rank measures for :mod:`benchmarks.scale.run`: seconds and bytes of a step with and without the force."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import etp_graph as etp

WIDTH, DEPTH, BATCH = 512, 6, 32
CALLS = ("all_reduce", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single")
"""What FSDP2 calls in one release of PyTorch or another."""


def build() -> nn.Module:
    """A network of dense layers, whose gradients take as long to send as those of larger ones in proportion."""
    torch.manual_seed(0)
    layers = [part for _ in range(DEPTH) for part in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
    return nn.Sequential(nn.Linear(64, WIDTH), nn.GELU(), *layers, nn.Linear(WIDTH, 8))


class Sent:
    """Bytes that a rank hands to collectives: what it contributes to a sum, or what it receives of a gather."""

    def __init__(self) -> None:
        self.bytes = 0

    def add(self, tensor: Tensor) -> None:
        self.bytes += tensor.numel() * tensor.element_size()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count the calls from Python; the reducer of DDP, which calls from C++, tells by its hook."""
        kept: dict[str, Callable[..., Any]] = {name: getattr(dist, name) for name in CALLS if hasattr(dist, name)}

        def counted(name: str, *args: Any, **options: Any) -> Any:
            tensors = [value for value in (*args, *options.values()) if isinstance(value, Tensor)]
            self.add(max(tensors, key=Tensor.numel))  # what is gathered, or what is reduced and scattered
            return kept[name](*args, **options)

        for name in kept:
            setattr(dist, name, functools.partial(counted, name))
        try:
            yield
        finally:
            for name, function in kept.items():
                setattr(dist, name, function)

    def hook(self, group, bucket):  # no annotations: PyTorch compares them with its own classes
        """A communication hook that counts, and sums as DDP does."""
        values = bucket.buffer().div_(dist.get_world_size())
        self.add(values)
        future = dist.all_reduce(values, async_op=True).get_future()
        return future.then(lambda done: done.value()[0])


def _placed(model: nn.Module, kind: str, sent: Sent) -> nn.Module:
    """The model as DDP or FSDP2 runs it."""
    if kind == "ddp":
        runner = DistributedDataParallel(model)
        runner.register_comm_hook(None, sent.hook)
        return runner
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    return model


def work(rank: int, size: int, kind: str, repetitions: int, folder: str) -> None:
    """One rank; rank 0 leaves the measurements behind."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=limit)
    model, sent = build(), Sent()
    x, y = torch.randn(BATCH, 64), torch.randint(8, (BATCH,))
    plan = etp.trace(model, x[:1], check=False)
    runner = _placed(model, kind, sent)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    method, budget = etp.methods.get("etp"), etp.Budget(speed_up=2.0)
    force = method.regularizer(model, plan, steps=repetitions + 2, budget=budget)
    assert force is not None

    def step() -> tuple[float, int]:
        dist.barrier()
        start, sent.bytes = time.perf_counter(), 0
        nn.functional.cross_entropy(runner(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start, sent.bytes

    found: dict[str, list[tuple[float, int]]] = {"plain": [], "force": []}
    with sent.watching() if kind == "fsdp2" else nullcontext():  # the hook of DDP would be counted twice
        for number in range(repetitions + 2):
            plain = step()
            with force.attach(optimizer):
                forced = step()
            if number >= 2:  # the first ones reserve memory
                found["plain"].append(plain)
                found["force"].append(forced)
    if rank == 0:
        torch.save({"found": found, "n_units": plan.n_units, "n_params": _n_params(model)}, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


def measure(kind: str, size: int, repetitions: int, folder: Path) -> dict[str, Any]:
    """Medians of seconds and bytes of a step, of rank 0."""
    mp.start_processes(work, (size, kind, repetitions, str(folder)), nprocs=size, start_method="spawn")
    left = torch.load(folder / "found.pt", weights_only=True)
    rows = left.pop("found")
    for name, row in rows.items():
        left[f"{name}_seconds"] = statistics.median(seconds for seconds, _ in row)
        left[f"{name}_bytes"] = int(statistics.median(count for _, count in row))
    return {**left, "batch": BATCH}


def _n_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
