"""Several processes with the same model (DDP): one selection for all of them, and the wrapper anew after surgery.

The force needs nothing from here: it depends on weights and learning rates alone, which are equal on all ranks, so a
:class:`etp_graph.Regularizer` of the bare model on every rank does the same everywhere, without communication.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from etp_graph.errors import PlanError
from etp_graph.plan import Plan, Selection
from etp_graph.surgery import prune_ as prune_here_

from ._agreement import Group, agree_on_selection, raise_everywhere


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
    chosen = agree_on_selection(model, plan, selection, group)
    act = partial(prune_here_, model, plan, chosen, optimizer=optimizer)
    raise_everywhere(act, "The models of the other ranks are pruned.", group, PlanError)
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
