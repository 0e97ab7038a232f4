"""Surgery: remove the units that a selection drops from a model.

All checks, and the steps that can fail, come before the first change of a tensor. Tensors are then replaced one at a
time, so that surgery takes no more memory than the model and its largest tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

from etp_graph.errors import PlanError
from etp_graph.model import is_sharded, named_tensors
from etp_graph.plan import ACTIVATION, Plan, Positions, Selection, SlicedAxis, with_no_unit
from etp_graph.standins import replace_, replaceable

from ._cuts import WEIGHT_NORM_DIRECTION, Cut, find_cuts, find_optimizer_states
from ._record import Edit, SurgeryRecord, get_record, read_attribute, replace_data, set_record, write_attribute


def prune_(
    model: nn.Module, plan: Plan, selection: Selection, *, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Remove the units that the selection drops, in place.

    The ``nn.Parameter`` objects stay the same (their ``.data`` shrinks), so optimizers, tied weights and references
    stay valid. Gradients, buffers and, with ``optimizer``, momentum and Adam state are cut in the same way.
    If an error is raised, nothing has changed.

    Raises:
        PlanError: the plan is of another model (or of this one before it was pruned), the optimizer does not hold the
            model's parameters or keeps state that cannot be cut, parameters are sharded (FSDP2), or inference mode is
            on.
        SelectionError: the selection violates a constraint of a group.
    """
    if torch.is_inference_mode_enabled():
        raise PlanError(
            "prune_ inside torch.inference_mode() would leave parameters that cannot train; leave it first."
        )
    plan.check(model)
    selection.check(plan)
    if shared := [name for name, tensor in named_tensors(model) if is_sharded(tensor)]:
        raise PlanError(f"{shared[0]} is shared among processes (FSDP2): use etp_graph.fsdp.prune, which rebuilds.")
    keep = with_no_unit(selection.flat(plan), True)
    tensors = dict(named_tensors(model))
    cuts = find_cuts(plan, tensors, keep)
    edits = _attribute_edits(model, plan, keep)
    changed = {name.rpartition(".")[0] for name in cuts} | {edit.module for edit in edits}
    standins = [name for name in replaceable(model) if any(at == name or at.startswith(f"{name}.") for at in changed)]
    states = find_optimizer_states(optimizer, cuts) if optimizer is not None else []
    rescaled = _weight_norms(cuts, tensors)
    _reserve_memory(cuts)
    replace_(model, standins)
    _write_attributes(model, edits)
    for name, value in rescaled.items():
        tensors[name].data.copy_(value)
    for name, cut in cuts.items():
        _cut_tensor(tensors[name], cut)
    for state, key, cut in states:
        state[key] = cut.apply(state[key])
    _extend_record(model, plan, selection, edits, set(cuts), standins)


def _reserve_memory(cuts: Mapping[str, Cut]) -> None:
    """Allocate and free the largest new tensor of each device, so that a lack of memory raises before any change.

    Each later step frees at least as much memory as it takes.
    """
    for device in {cut.tensor.device for cut in cuts.values()}:
        mine = [cut for cut in cuts.values() if cut.tensor.device == device]
        largest = max(mine, key=lambda cut: prod(cut.shape) * cut.tensor.element_size())
        largest.tensor.new_empty(largest.shape)


def _cut_tensor(tensor: Tensor, cut: Cut) -> None:
    """Replace a tensor and its gradient by their kept parts."""
    grad = None if tensor.grad is None else cut.apply(tensor.grad.to_dense())  # embeddings may have sparse gradients
    tensor.grad = None
    replace_data(tensor, cut.apply(tensor))
    tensor.grad = grad


def _attribute_edits(model: nn.Module, plan: Plan, keep: Tensor) -> list[Edit]:
    edits = []
    for (module, name, item), layers in Positions(plan).attributes.items():
        if module == ACTIVATION:
            continue
        kept = SlicedAxis(module, 0, tuple(layers)).kept_positions(keep)
        removed = int((~kept).sum())
        if removed:
            now = read_attribute(model, Edit(module=module, name=name, item=item, value=0))
            edits.append(Edit(module=module, name=name, item=item, value=now - removed))
    return edits


def _weight_norms(cuts: Mapping[str, Cut], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return new magnitudes, not yet cut, for weight-normalised layers that lose inputs.

    The weight is g * v / ||v||. Without the removed inputs ||v|| is smaller, so g must shrink in proportion to keep the
    other weights.
    """
    rescaled = {}
    for name, cut in cuts.items():
        if not name.endswith(WEIGHT_NORM_DIRECTION):
            continue
        magnitude = name[: -len("1")] + "0"
        g = tensors[magnitude].detach()
        dims = [d for d in range(g.ndim) if g.shape[d] == 1]
        v = cut.tensor.detach()
        inner = {axis: index for axis, index in cut.kept.items() if axis in dims}
        part = v
        for axis, index in inner.items():
            part = part.index_select(axis, index)
        if inner:
            length = torch.linalg.vector_norm(v, dim=dims, keepdim=True)
            rescaled[magnitude] = g * torch.linalg.vector_norm(part, dim=dims, keepdim=True) / length
    return rescaled


def _write_attributes(model: nn.Module, edits: list[Edit]) -> None:
    """Write all attributes. If one cannot be written, restore those written before it."""
    before = [Edit(module=e.module, name=e.name, item=e.item, value=read_attribute(model, e)) for e in edits]
    done = 0
    try:
        for edit in edits:
            write_attribute(model, edit)
            done += 1
    finally:
        if done < len(edits):
            for edit in before[:done]:
                write_attribute(model, edit)


def _extend_record(
    model: nn.Module, plan: Plan, selection: Selection, edits: list[Edit], cut: set[str], standins: list[str]
) -> None:
    old = get_record(model)
    merged = {(e.module, e.name, e.item): e for e in (*old.edits, *edits)}
    record = SurgeryRecord(
        fingerprints=(*old.fingerprints, plan.fingerprint),
        selections=(*old.selections, selection.to_json()),
        edits=tuple(merged.values()),
        tensors=tuple(sorted({*old.tensors, *cut})),
        standins=(*old.standins, *standins),
    )
    set_record(model, record)
