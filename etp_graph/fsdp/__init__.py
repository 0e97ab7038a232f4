"""FSDP2 (``fully_shard``): no process ever holds the whole model, from tracing to the pruned checkpoint.

The force needs nothing from here: a :class:`etp_graph.Regularizer` of a model whose parameters are DTensors reads and
shrinks local shards, and adds up the norms of units with one small all-reduce in a step.

Surgery cannot shrink a parameter inside of ``fully_shard``, which fixes its shape for good. So :func:`prune` makes the
model anew: the architecture on the meta device, cut and sharded, then each tensor by itself.
"""

from __future__ import annotations

from ._files import load, load_optimizer_, save
from ._model import Shard, prepare, prune

__all__ = [
    "Shard",
    "load",
    "load_optimizer_",
    "prepare",
    "prune",
    "save",
]
