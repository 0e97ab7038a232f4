"""From a selection to a smaller model: compute every new tensor, then commit all of them or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapters import replace_, replaceable
from .errors import PlanError
from .plan import ACTIVATION, Plan, Selection, named_tensors
from .record import Edit, Record, get_record, read_attribute, replace_data, set_record, write_attribute
from .units import Axis, attribute_units, axes, extend

_NORMED = ".parametrizations.weight.original1"


@dataclass(slots=True)
class _Cut:
    """The positions of one tensor that stay, by axis."""

    tensor: Tensor
    kept: dict[int, Tensor]

    def apply(self, tensor: Tensor) -> Tensor:
        """The kept part of a tensor of the original shape, in its memory format."""
        out = tensor.detach()
        for axis, index in self.kept.items():
            out = out.index_select(axis, index)
        for form, ndim in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
            if tensor.ndim == ndim and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=form):
                return out.contiguous(memory_format=form)
        return out.contiguous()


def prune_(
    model: nn.Module, plan: Plan, selection: Selection, *, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Remove the units that the selection drops, in place.

    The ``nn.Parameter`` objects stay the same (their ``.data`` shrinks), so optimizers, tied weights and references
    stay valid; gradients, buffers and, with ``optimizer``, momentum and Adam state are cut along.
    Either everything is done or, after an error, nothing.

    Raises:
        PlanError: the plan is of another model (or of this one before it was pruned), the optimizer does not hold the
            model's parameters or keeps state that cannot be cut, or inference mode is on.
        SelectionError: the selection violates a constraint of a group.
    """
    if torch.is_inference_mode_enabled():
        raise PlanError(
            "prune_ inside torch.inference_mode() would leave parameters that cannot train; leave it first."
        )
    plan.check(model)
    selection.check(plan)
    keep = extend(selection.flat(plan), True)
    tensors = dict(named_tensors(model))
    cuts = _cuts(plan, tensors, keep)
    edits = _edits(model, plan, keep)
    changed = {name.rpartition(".")[0] for name in cuts} | {edit.module for edit in edits}
    standins = [name for name in replaceable(model) if any(at == name or at.startswith(f"{name}.") for at in changed)]
    states = _states(optimizer, cuts) if optimizer is not None else []
    rescaled = _weight_norms(cuts, tensors)
    new = {name: cut.apply(cut.tensor) for name, cut in cuts.items()}
    new |= {name: value for name, value in rescaled.items() if name not in cuts}
    new |= {name: cuts[name].apply(value) for name, value in rescaled.items() if name in cuts}
    grads = {name: _cut_grad(cut) for name, cut in cuts.items() if cut.tensor.grad is not None}
    new_states = [(state, key, cut.apply(value)) for state, key, value, cut in states]
    replace_(model, standins)
    _write(model, edits)
    for name, data in new.items():
        tensors[name].grad = None if name in cuts else tensors[name].grad
        replace_data(tensors[name], data)
    for name, grad in grads.items():
        tensors[name].grad = grad
    for state, key, value in new_states:
        state[key] = value
    _remember(model, plan, selection, edits, set(cuts), standins)


def _cuts(plan: Plan, tensors: Mapping[str, Tensor], keep: Tensor) -> dict[str, _Cut]:
    cuts: dict[str, _Cut] = {}
    for name, parts in axes(plan).items():
        kept = {part.axis: mask.nonzero().flatten() for part in parts if not bool((mask := part.kept(keep)).all())}
        if kept:
            device = tensors[name].device
            cuts[name] = _Cut(tensors[name], {axis: index.to(device) for axis, index in kept.items()})
    return cuts


def _cut_grad(cut: _Cut) -> Tensor:
    assert cut.tensor.grad is not None
    return cut.apply(cut.tensor.grad.to_dense())  # embeddings may have sparse gradients


def _edits(model: nn.Module, plan: Plan, keep: Tensor) -> list[Edit]:
    edits = []
    for (module, name, item), layers in attribute_units(plan).items():
        if module == ACTIVATION:
            continue
        kept = Axis(module, 0, tuple(layers)).kept(keep)
        removed = int((~kept).sum())
        if removed:
            now = read_attribute(model, Edit(module=module, name=name, item=item, value=0))
            edits.append(Edit(module=module, name=name, item=item, value=now - removed))
    return edits


def _states(
    optimizer: torch.optim.Optimizer, cuts: Mapping[str, _Cut]
) -> list[tuple[dict[str, object], str, Tensor, _Cut]]:
    """Every entry of the optimizer's state that has the shape of a parameter that is cut."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {id(cut.tensor): name for name, cut in cuts.items()}
    found = []
    for parameter, state in optimizer.state.items():
        for key, value in state.items() if cuts else ():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                raise PlanError(
                    f"the optimizer keeps state {key!r} of shape {list(value.shape)} for "
                    f"{names.get(id(parameter), 'a parameter')} of shape {list(parameter.shape)}, which cannot be cut: "
                    "prune without it and make a new optimizer."
                )
    for name, cut in cuts.items():
        if not isinstance(cut.tensor, nn.Parameter):
            continue
        if id(cut.tensor) not in held:
            if cut.tensor.requires_grad:
                raise PlanError(
                    f"the optimizer does not hold {name}: pass the optimizer that trains this model, or none."
                )
            continue
        state = optimizer.state.get(cut.tensor, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.numel() > 1:
                found.append((state, key, value, cut))
    return found


def _weight_norms(cuts: Mapping[str, _Cut], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Magnitudes of weight-normalised layers, so that the weights that stay are what they were.

    weight = g * v / ||v||: without its removed inputs v is shorter, and g shrinks in proportion.
    """
    rescaled = {}
    for name, cut in cuts.items():
        if not name.endswith(_NORMED):
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


def _write(model: nn.Module, edits: list[Edit]) -> None:
    """All attributes or none."""
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


def _remember(
    model: nn.Module, plan: Plan, selection: Selection, edits: list[Edit], cut: set[str], standins: list[str]
) -> None:
    old = get_record(model)
    merged = {(e.module, e.name, e.item): e for e in (*old.edits, *edits)}
    record = Record(
        fingerprints=(*old.fingerprints, plan.fingerprint),
        selections=(*old.selections, selection.to_json()),
        edits=tuple(merged.values()),
        tensors=tuple(sorted({*old.tensors, *cut})),
        standins=(*old.standins, *standins),
    )
    set_record(model, record)
