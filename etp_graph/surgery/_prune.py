"""Surgery: remove the units that a selection drops from a model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from etp_graph.errors import PlanError
from etp_graph.plan import Plan, Selection, with_no_unit

from ._commit import PreparedChanges
from ._optimizer_states import OnUncuttable, Optimizers, check_choice, check_held, list_optimizers, prepare_states
from ._prepare import PreparedModel, bare_copies, prepare_model


def prepare_surgery(
    model: nn.Module,
    plan: Plan,
    selection: Selection,
    *,
    optimizer: Optimizers = None,
    also: nn.Module | Iterable[nn.Module] = (),
    on_uncuttable: OnUncuttable = "refuse",
) -> PreparedChanges:
    """Do all of :func:`prune_` that can fail, and change nothing. The arguments are those of :func:`prune_`.

    Raises:
        PlanError, SelectionError: as :func:`prune_`.
    """
    if torch.is_inference_mode_enabled():
        raise PlanError(
            "prune_ inside torch.inference_mode() would leave parameters that cannot train; leave it first."
        )
    check_choice(on_uncuttable)
    optimizers, others = list_optimizers(optimizer), bare_copies(model, plan, also)
    plan.check(model)
    selection.check(plan)
    keep = with_no_unit(selection.flat(plan), True)
    first: PreparedModel = prepare_model(model, plan, selection, keep)
    check_held(optimizers, first.cuts)
    states = [change for one in optimizers for change in prepare_states(one, first.cuts, on_uncuttable)]
    rest = [prepare_model(other, plan, selection, keep) for other in others]
    # Attributes come first: setters of the user's modules may raise. Nothing raises after them.
    prepared = (first, *rest)
    attributes = [change for one in prepared for change in one.attributes]
    tensors = [change for one in prepared for change in one.tensors]
    return PreparedChanges([*attributes, *states, *tensors, *(one.record for one in prepared)])


def prune_(
    model: nn.Module,
    plan: Plan,
    selection: Selection,
    *,
    optimizer: Optimizers = None,
    also: nn.Module | Iterable[nn.Module] = (),
    on_uncuttable: OnUncuttable = "refuse",
) -> None:
    """Remove the units that the selection drops, in place.

    The ``nn.Parameter`` objects stay the same (their ``.data`` shrinks), so optimizers, tied weights and references
    stay valid. Gradients, buffers and, with ``optimizer``, momentum and Adam state are cut in the same way.

    Surgery is all or nothing. All new tensors are made before the first change, so it needs memory for them besides the
    model. After any exception, also ``KeyboardInterrupt`` and ``MemoryError``, models, optimizers and records are as
    before. A signal that arrives during the change itself is handled after it.

    Args:
        model: the model.
        plan: its plan.
        selection: the units that stay.
        optimizer: the optimizer that trains the model, or several that share its parameters.
        also: other models of the same architecture that lose the same units: a moving average
            (``torch.optim.swa_utils.AveragedModel``, timm's ``ModelEmaV3``) or a teacher. A wrapper may be passed.
        on_uncuttable: what to do with states of the optimizer of which it is not known how to cut them, such as
            preconditioners. ``"refuse"`` raises an error. ``"reset"`` forgets the state of each parameter that has
            one, so that the optimizer begins it anew.

    Raises:
        PlanError: the plan is of another model (or of this one before it was pruned), an attribute would not agree with
            the weights, the optimizer does not hold the model's parameters or keeps state that cannot be cut,
            parameters are sharded (FSDP2), or inference mode is on.
        SelectionError: the selection violates a constraint of a group.
    """
    prepare_surgery(model, plan, selection, optimizer=optimizer, also=also, on_uncuttable=on_uncuttable).commit()
