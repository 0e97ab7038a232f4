"""Tracing, pruning and saving of models that are sharded by FSDP2 (``fully_shard``).

No process holds the whole model, except rank 0 in :func:`prepare`.

Regularizers do not need this module. A :class:`etp_graph.Regularizer` of a model whose parameters are DTensors reads
and shrinks local shards, and sums the norms of units with one small all-reduce in a step.

Surgery cannot shrink a parameter under ``fully_shard``, which fixes its shape. So :func:`prune` builds a new model: it
builds the architecture on the meta device, cuts and shards it, and then fills it with values, one tensor at a time.
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
from etp_graph.surgery import WEIGHT_NORM_DIRECTION, Cut, find_cuts, prune_, require_full_shapes

from . import _reshard as reshard
from ._reshard import Build

Shard = Callable[[nn.Module], object]
"""Function that applies ``fully_shard`` to the model and its submodules, in place."""


def prepare(
    build: Build,
    example_inputs: Any,
    *,
    shard: Shard,
    source: Build | None = None,
    group: Group | None = None,
    **options: Any,
) -> tuple[nn.Module, Plan]:
    """Trace a model on the meta device, shard it, and fill the shards with values.

    Every rank of the group must call this. Meanwhile rank 0 holds the whole model on the CPU. For a model that is too
    large for this, use :func:`load`.

    Args:
        build: builds the dense architecture.
        example_inputs: as for :func:`etp_graph.trace`, with values, on the CPU.
        shard: applies ``fully_shard``.
        source: builds the model with its values; called on rank 0 only. Default: ``build``.
        group: the process group; default: all processes.
        options: options of :func:`etp_graph.trace`. ``check`` is off by default, because it needs a whole model.

    Returns:
        The sharded model, and its plan, which is the same on all ranks.

    Raises:
        PlanError: there is no process group, ``build`` does not build on the meta device, the forward needs values, or
            ``source`` builds another model.
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
    """Return a new sharded model with only the units that rank 0's selection keeps.

    Every rank of the group must call this. Tensors are cut one at a time. If the cut axis is not divided among
    processes, each process cuts its shard. Else the tensor is gathered, cut, and divided again. The old model loses its
    parameters and must not be used afterwards. Hooks on it are not copied.

    Args:
        model: the sharded model. Parameters that are still gathered after a forward are sharded again.
        plan: the plan of this rank; it must be the same everywhere.
        selection: the selection of rank 0; ignored on other ranks.
        build: builds the dense architecture, as before any surgery.
        shard: applies ``fully_shard``; it may choose other placements than before.
        optimizer: the optimizer that trains the model. It gets the parameters of the new model, and its state is cut in
            the same way.
        group: the process group; default: all processes.

    Returns:
        The pruned model, in the mode of the old one, with its record of surgery.

    Raises:
        PlanError: see :func:`etp_graph.distributed.prune_`. Also if the model has weight norms, or ``build`` builds
            another architecture or does not build on the meta device. Raised on all ranks, and nothing has changed.
        SelectionError: the selection violates a constraint of the plan; raised on all ranks, and nothing has changed.
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
    """Return the pruned architecture on the meta device, and the cuts by tensor. This does not wait for other ranks."""
    tensors = dict(named_tensors(model))
    cuts = find_cuts(plan, tensors, with_no_unit(selection.flat(plan), True))
    if normed := [name for name in cuts if name.endswith(WEIGHT_NORM_DIRECTION)]:
        raise PlanError(f"{normed[0]} is weight-normalised, which needs whole tensors: remove the parametrization.")
    if optimizer is not None:
        require_full_shapes(optimizer, cuts)
    manifest: Manifest = describe_model(model, sharded=True)
    small = reshard.skeleton(build, manifest)
    prune_(small, plan.to("meta"), selection)
    for (_, was), now in zip(model.named_modules(), small.modules(), strict=True):
        now.training = was.training
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(tensors[name].requires_grad)
    return small, cuts
