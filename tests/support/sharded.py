"""A sharded checkpoint in this process alone: a group of one rank, without other processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import etp_graph as etp
from etp_graph import fsdp
from tests.support.models.fsdp_models import cnn


@contextmanager
def alone() -> Iterator[None]:
    """Make this process a group of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module) -> object:
    return fully_shard(model)


def pruned() -> nn.Module:
    """A pruned model with its shards, which are whole on one rank."""
    x = torch.zeros(1, 2, 8, 8)
    model, plan = fsdp.prepare(cnn, x, shard=shard)
    chosen = etp.Selection({"0": torch.arange(10) < 6})  # type: ignore[dict-item]
    return fsdp.prune(model, plan, chosen, build=cnn, shard=shard)


def load(folder: Path) -> dict[str, Tensor]:
    """Load a folder; return all values."""
    model = fsdp.load(folder, build=cnn, shard=shard)
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}  # type: ignore[operator]
