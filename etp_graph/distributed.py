"""Several processes with the same model (DDP): one selection for all of them, and the wrapper anew after surgery.

The force needs nothing from here: it depends on weights and learning rates alone, which are equal on all ranks, so a
:class:`etp_graph.Regularizer` of the bare model on every rank does the same everywhere, without communication.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .errors import EtpError, PlanError
from .plan import Plan, Selection
from .surgery import prune_ as prune_here_

Group = dist.ProcessGroup


def prune_(
    model: nn.Module,
    plan: Plan,
    selection: Selection | None = None,
    *,
    optimizer: Optimizer | None = None,
    group: Group | None = None,
) -> Selection:
    """Remove on every rank the units that rank 0's selection drops, in place. Every rank of the group calls this.

    The wrapper of the model keeps the shapes from before: wrap the model anew afterwards, see :func:`rewrap`.

    Args:
        model: the bare model of this rank, not its wrapper.
        plan: the plan of this rank; it must be the same everywhere.
        selection: rank 0's; what other ranks pass is ignored.
        optimizer: as for :func:`etp_graph.prune_`.
        group: the processes; default: all.

    Returns:
        The selection that was applied.

    Raises:
        PlanError: there is no process group, the model is a wrapper, plans differ between ranks, or rank 0 has no
            selection: on all ranks, and no model was changed. Or: surgery failed on some ranks; the message says on
            which, and the models of the others are pruned.
        SelectionError: the selection violates a constraint of the plan: on all ranks, and no model was changed.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise PlanError("there is no process group: call init_process_group first, or use etp_graph.prune_.")
    reason = _attempt(lambda: plan.check(model))
    found = _gather((reason, plan.fingerprint), group)
    _raise_first([reason for reason, _ in found], "No model was changed.")
    odd = [rank for rank, (_, fingerprint) in enumerate(found) if fingerprint != found[0][1]]
    if odd:
        raise PlanError(
            f"the plan of rank {', '.join(map(str, odd))} is another than rank 0's: trace the same model with the same "
            "example inputs and options on every rank, or send rank 0's plan (plan.to_json())."
        )
    chosen = _from_first(selection, group)
    chosen.check(plan)
    reason = _attempt(lambda: prune_here_(model, plan, chosen, optimizer=optimizer))
    _raise_first([text for (text,) in _gather((reason,), group)], "The models of the other ranks are pruned.")
    return chosen


def rewrap(wrapped: DistributedDataParallel, **options: Any) -> DistributedDataParallel:
    """A new wrapper of the same model with the same process group and options, after surgery. Every rank calls this.

    The old wrapper lets go of the parameters and must not be used any more. Communication hooks and sizes of buckets
    are not taken over.

    Args:
        wrapped: the wrapper from before surgery, whose reducer holds the old shapes.
        options: of ``DistributedDataParallel``, where they should differ from the old wrapper's.

    Raises:
        PlanError: this is no ``DistributedDataParallel``.
    """
    if not isinstance(wrapped, DistributedDataParallel):
        raise PlanError(f"expected a DistributedDataParallel, got {type(wrapped).__name__}: pass the old wrapper.")
    return DistributedDataParallel(wrapped.module, **{**_released(wrapped), **options})


def rewrap_(wrapped: DistributedDataParallel) -> None:
    """As :func:`rewrap`, in place, for loops that hold the wrapper. Hooks of the wrapper itself are not kept."""
    module, training = wrapped.module, wrapped.training
    kept = _released(wrapped)
    DistributedDataParallel.__init__(wrapped, module, **kept)
    wrapped.training = training


def _released(wrapped: DistributedDataParallel) -> dict[str, Any]:
    """The options of a wrapper that lets go of its parameters."""
    wrapped._remove_autograd_hooks()  # of parameters that surgery did not touch
    buffers = "forward_sync_buffers" if hasattr(wrapped, "forward_sync_buffers") else "broadcast_buffers"
    return {
        "device_ids": wrapped.device_ids, "output_device": wrapped.output_device, "dim": wrapped.dim,
        "process_group": wrapped.process_group, buffers: getattr(wrapped, buffers),
        "find_unused_parameters": wrapped.find_unused_parameters, "static_graph": wrapped.static_graph,
        "gradient_as_bucket_view": wrapped.gradient_as_bucket_view, "mixed_precision": wrapped.mixed_precision,
    }  # fmt: skip


def _attempt(action: Callable[[], object]) -> str:
    """What went wrong, or nothing: an exception on one rank would leave the others waiting."""
    try:
        action()
    except EtpError as error:
        return str(error) or type(error).__name__
    return ""


def _gather(value: tuple[str, ...], group: Group | None) -> list[tuple[str, ...]]:
    """The values of all ranks."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def _from_first(selection: Selection | None, group: Group | None) -> Selection:
    """The selection of the group's first rank."""
    mine = dist.get_rank(group) == 0
    text = [selection.to_json() if mine and selection is not None else None]
    dist.broadcast_object_list(text, src=dist.get_global_rank(group, 0) if group is not None else 0, group=group)
    if text[0] is None:
        raise PlanError("rank 0 has no selection: allocate there, and pass it.")
    return Selection.from_json(text[0])


def _raise_first(reasons: list[str], consequence: str) -> None:
    """Raise on every rank what went wrong on some."""
    bad = [rank for rank, reason in enumerate(reasons) if reason]
    if bad:
        raise PlanError(f"rank {', '.join(map(str, bad))}: {reasons[bad[0]]} {consequence}")
