"""Pruning with several processes that hold the same model (DDP): one selection for all, then a new DDP wrapper.

Regularizers do not need this module. The force depends only on weights and learning rates, which are equal on all
ranks. So a :class:`etp_graph.Regularizer` of the bare model on every rank does the same everywhere, without
communication.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from etp_graph.errors import PlanError
from etp_graph.plan import Plan, Selection
from etp_graph.surgery import OnUncuttable, Optimizers, PreparedChanges, hold_signals, prepare_surgery

from ._agreement import Group, agree_on_selection, raise_everywhere


def prune_(
    model: nn.Module,
    plan: Plan,
    selection: Selection | None = None,
    *,
    optimizer: Optimizers = None,
    also: nn.Module | Iterable[nn.Module] = (),
    on_uncuttable: OnUncuttable = "refuse",
    group: Group | None = None,
) -> Selection:
    """Remove on every rank the units that rank 0's selection drops, in place. Every rank of the group must call this.

    All ranks prepare their surgery, agree that it can be done, and then commit it. If it fails on one rank for any
    reason, no rank's model has changed.

    The wrapper of the model keeps the old shapes, so wrap the model again afterwards; see :func:`rewrap`.

    Args:
        model: the bare model of this rank, not its wrapper.
        plan: the plan of this rank; it must be the same everywhere.
        selection: the selection of rank 0; ignored on other ranks.
        optimizer, also, on_uncuttable: as for :func:`etp_graph.prune_`.
        group: the process group; default: all processes.

    Returns:
        The selection that was applied.

    Raises:
        PlanError: there is no process group, the model is a wrapper, plans differ between ranks, or rank 0 has no
            selection; or surgery fails on some ranks, whom the message names (an optimizer of another model, a lack of
            memory). This is raised on all ranks, and no model has changed.
        SelectionError: the selection violates a constraint of the plan; raised on all ranks, no model has changed.
    """
    chosen = agree_on_selection(model, plan, selection, group)
    ready: list[PreparedChanges] = []

    def prepare() -> None:
        ready.append(prepare_surgery(model, plan, chosen, optimizer=optimizer, also=also, on_uncuttable=on_uncuttable))

    raise_everywhere(prepare, "No model was changed.", group, PlanError)
    hold_signals(lambda: _commit_everywhere(ready[0], group))
    return chosen


def _commit_everywhere(surgery: PreparedChanges, group: Group | None) -> None:
    """Commit on all ranks. If one fails, or does not answer, undo it on this one."""
    try:
        raise_everywhere(surgery.commit, "No model was changed.", group, PlanError)
    except BaseException:
        surgery.undo()
        raise


def rewrap(wrapped: DistributedDataParallel, **options: Any) -> DistributedDataParallel:
    """Return a new wrapper of the same model after surgery, with the same options. Every rank must call this.

    The process group stays the same. The old wrapper releases the parameters and must not be used afterwards.
    Communication hooks and bucket sizes are not copied.

    Args:
        wrapped: the wrapper from before surgery, whose reducer holds the old shapes.
        options: options of ``DistributedDataParallel`` that replace those of the old wrapper.

    Raises:
        PlanError: ``wrapped`` is not a ``DistributedDataParallel``.
    """
    if not isinstance(wrapped, DistributedDataParallel):
        raise PlanError(f"expected a DistributedDataParallel, got {type(wrapped).__name__}: pass the old wrapper.")
    return DistributedDataParallel(wrapped.module, **{**_released(wrapped), **options})


def rewrap_(wrapped: DistributedDataParallel) -> None:
    """Do as :func:`rewrap`, but in place, for loops that hold the wrapper. Hooks of the wrapper itself are lost."""
    module, training = wrapped.module, wrapped.training
    kept = _released(wrapped)
    DistributedDataParallel.__init__(wrapped, module, **kept)
    wrapped.training = training


def _released(wrapped: DistributedDataParallel) -> dict[str, Any]:
    """Make a wrapper release its parameters, and return its options."""
    wrapped._remove_autograd_hooks()  # parameters that surgery did not change still have them
    buffers = "forward_sync_buffers" if hasattr(wrapped, "forward_sync_buffers") else "broadcast_buffers"
    return {
        "device_ids": wrapped.device_ids, "output_device": wrapped.output_device, "dim": wrapped.dim,
        "process_group": wrapped.process_group, buffers: getattr(wrapped, buffers),
        "find_unused_parameters": wrapped.find_unused_parameters, "static_graph": wrapped.static_graph,
        "gradient_as_bucket_view": wrapped.gradient_as_bucket_view, "mixed_precision": wrapped.mixed_precision,
    }  # fmt: skip
