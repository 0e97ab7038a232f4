"""FSDP2 (``fully_shard``): no process ever holds the whole model, from tracing to the pruned checkpoint.

The force needs nothing from here: a :class:`etp_graph.Regularizer` of a model whose parameters are DTensors reads and
shrinks local shards, and adds up the norms of units with one small all-reduce in a step.

Surgery cannot shrink a parameter inside of ``fully_shard``, which fixes its shape for good. So :func:`prune` makes the
model anew: the architecture on the meta device, cut and sharded, then each tensor by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from etp_graph.checkpoint import Manifest, describe_model
from etp_graph.distributed import Group, agree_on_selection, first_rank, raise_everywhere, require_group
from etp_graph.errors import PlanError
from etp_graph.graph import trace
from etp_graph.model import all_tensors, named_tensors
from etp_graph.plan import Plan, Selection, with_no_unit
from etp_graph.surgery import WEIGHT_NORM_DIRECTION, Cut, find_cuts, find_optimizer_states, prune_

from . import _reshard as reshard
from ._reshard import Build

Shard = Callable[[nn.Module], object]
"""Applies ``fully_shard`` to the model and its submodules, in place."""


def prepare(
    build: Build,
    example_inputs: Any,
    *,
    shard: Shard,
    source: Build | None = None,
    group: Group | None = None,
    **options: Any,
) -> tuple[nn.Module, Plan]:
    """Trace on the meta device, shard, and give the shards their values. Every rank of the group calls this.

    Rank 0 alone holds the whole model meanwhile, on the CPU; for one that fits nowhere use :func:`load`.

    Args:
        build: makes the dense architecture.
        example_inputs: as for :func:`etp_graph.trace`, with values, on the CPU.
        shard: applies ``fully_shard``.
        source: makes the model with its values; called on rank 0 alone. Default: ``build``.
        group: the processes; default: all.
        options: of :func:`etp_graph.trace`; the check needs a whole model, so it is off.

    Returns:
        The sharded model, and its plan, the same on all ranks.

    Raises:
        PlanError: there is no process group, ``build`` does not build on the meta device, the forward needs values, or
            ``source`` makes another model.
    """
    require_group()
    model = reshard.on_meta(build)
    plan = trace(model, example_inputs, **{"check": False, **options})
    shard(model)
    values: dict[str, Tensor] = {}
    shapes = {name: tensor.shape for name, tensor in all_tensors(model).items()}

    def read() -> None:
        if dist.get_rank(group) == 0:
            values.update(all_tensors((source or build)()))
            odd = [n for n, shape in shapes.items() if n not in values or values[n].shape != shape or values[n].is_meta]
            if odd:
                raise PlanError(f"{odd[0]} of build() has no values in source(): build the same model.")

    raise_everywhere(read, "Nothing was made.", group, PlanError)
    device = reshard.device_of(model)

    def received(name: str, like: Tensor) -> Tensor:
        whole = torch.empty(like.shape, dtype=like.dtype, device=device)
        if values:
            whole.copy_(values[name].detach())
        dist.broadcast(whole, src=first_rank(group), group=group)
        return reshard.shard_of(whole, like)

    reshard.fill_(model, received)
    return model, plan.to(device.type)


def prune(
    model: nn.Module,
    plan: Plan,
    selection: Selection | None = None,
    *,
    build: Build,
    shard: Shard,
    optimizer: Optimizer | None = None,
    group: Group | None = None,
) -> nn.Module:
    """The smaller model of the units that rank 0's selection keeps, sharded anew. Every rank of the group calls this.

    One tensor after the other is cut: where it lies, if the axis that is cut is not divided; else gathered, cut, and
    divided again. The old model loses its parameters and must not be used any more; hooks on it are not taken over.

    Args:
        model: the sharded model. Parameters that are gathered after a forward are sharded again.
        plan: the plan of this rank; it must be the same everywhere.
        selection: rank 0's; what other ranks pass is ignored.
        build: makes the dense architecture, as before any surgery.
        shard: applies ``fully_shard``; it may choose other placements than before.
        optimizer: trains the model; it goes on with the parameters of the new one, and its state is cut along.
        group: the processes; default: all.

    Returns:
        The pruned model, in the mode of the old one, with its record of surgery.

    Raises:
        PlanError: see :func:`etp_graph.distributed.prune_`; or the model has weight norms, or ``build`` makes another
            architecture, or not on the meta device. On all ranks, and nothing was changed.
        SelectionError: the selection violates a constraint of the plan: on all ranks, and nothing was changed.
    """
    require_group()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    chosen = agree_on_selection(model, plan, selection, group)
    held: list[tuple[nn.Module, dict[str, Cut]]] = []
    ready = partial(_ready, model, plan, chosen, build, optimizer)
    raise_everywhere(lambda: held.append(ready()), "Nothing was changed.", group, PlanError)
    small, cuts = held[0]
    shard(small)
    old, kept = all_tensors(model), {name: cut.kept for name, cut in cuts.items()}
    reshard.fill_(small, lambda name, like: reshard.cut_shard(old[name], kept.get(name, {}), like))
    if optimizer is not None:
        before, after = dict(model.named_parameters()), dict(small.named_parameters())
        states = reshard.follow(optimizer, before, after, kept)
        reshard.hand_over_(optimizer, before, after, states)
    reshard.empty_(model)
    return small


def _ready(
    model: nn.Module, plan: Plan, selection: Selection, build: Build, optimizer: Optimizer | None
) -> tuple[nn.Module, dict[str, Cut]]:
    """The pruned architecture on the meta device, and what is cut of which tensor; nothing that waits for others."""
    tensors = dict(named_tensors(model))
    cuts = find_cuts(plan, tensors, with_no_unit(selection.flat(plan), True))
    if normed := [name for name in cuts if name.endswith(WEIGHT_NORM_DIRECTION)]:
        raise PlanError(f"{normed[0]} is weight-normalised, which needs whole tensors: remove the parametrization.")
    if optimizer is not None:
        find_optimizer_states(optimizer, cuts)
    manifest: Manifest = describe_model(model, sharded=True)
    small = reshard.skeleton(build, manifest)
    prune_(small, plan.to("meta"), selection)
    for (_, was), now in zip(model.named_modules(), small.modules(), strict=True):
        now.training = was.training
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(tensors[name].requires_grad)
    return small, cuts
