"""From a selection to a smaller model: find every cut and every obstacle, then cut tensor after tensor.

What can fail is done first. Then each tensor is replaced by its smaller self before the next one is touched, so that
surgery takes no more memory than the model and its largest tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import replace_, replaceable
from .errors import PlanError
from .plan import ACTIVATION, Plan, Selection, named_tensors
from .record import Edit, Record, get_record, read_attribute, replace_data, set_record, write_attribute
from .shards import is_sharded
from .units import Axis, attribute_units, axes, extend

NORMED = ".parametrizations.weight.original1"


_CHUNK = 1 << 20
"""Elements: a tensor that is cut along several axes is cut in pieces of at most so many."""


@dataclass(slots=True)
class Cut:
    """The positions of one tensor that stay, by axis."""

    tensor: Tensor
    kept: dict[int, Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """What is left of the shape."""
        return tuple(len(self.kept[d]) if d in self.kept else n for d, n in enumerate(self.tensor.shape))

    def apply(self, tensor: Tensor) -> Tensor:
        """The kept part of a tensor of the original shape, in its memory format."""
        (first, rows), *others = sorted(self.kept.items())
        step = max(1, _CHUNK * tensor.shape[first] // max(1, tensor.numel()))
        if not others or step >= len(rows):
            return self._select(tensor.detach(), rows).contiguous(memory_format=_form(tensor))
        # in pieces: a tensor between the old and the new one would be a third
        out = torch.empty(self.shape, dtype=tensor.dtype, device=tensor.device, memory_format=_form(tensor))
        for start, piece in zip(range(0, len(rows), step), rows.split(step), strict=True):
            out.narrow(first, start, len(piece)).copy_(self._select(tensor.detach(), piece))
        return out

    def _select(self, values: Tensor, rows: Tensor) -> Tensor:
        (first, _), *others = sorted(self.kept.items())
        out = values.index_select(first, rows)
        for axis, index in others:
            out = out.index_select(axis, index)
        return out


def _form(tensor: Tensor) -> torch.memory_format:
    for form, ndim in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if tensor.ndim == ndim and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=form):
            return form
    return torch.contiguous_format


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
    if shared := [name for name, tensor in named_tensors(model) if is_sharded(tensor)]:
        raise PlanError(f"{shared[0]} is shared among processes (FSDP2): use etp_graph.fsdp.prune, which rebuilds.")
    keep = extend(selection.flat(plan), True)
    tensors = dict(named_tensors(model))
    cuts = find_cuts(plan, tensors, keep)
    edits = _edits(model, plan, keep)
    changed = {name.rpartition(".")[0] for name in cuts} | {edit.module for edit in edits}
    standins = [name for name in replaceable(model) if any(at == name or at.startswith(f"{name}.") for at in changed)]
    states = find_states(optimizer, cuts) if optimizer is not None else []
    rescaled = _weight_norms(cuts, tensors)
    _reserve(cuts)
    replace_(model, standins)
    _write(model, edits)
    for name, value in rescaled.items():
        tensors[name].data.copy_(value)
    for name, cut in cuts.items():
        _commit(tensors[name], cut)
    for state, key, cut in states:
        state[key] = cut.apply(state[key])
    _remember(model, plan, selection, edits, set(cuts), standins)


def find_cuts(plan: Plan, tensors: Mapping[str, Tensor], keep: Tensor) -> dict[str, Cut]:
    """What is cut of which tensor, given ``keep`` bool [n_units + 1] whose last entry is True."""
    cuts: dict[str, Cut] = {}
    for name, parts in axes(plan).items():
        kept = {part.axis: mask.nonzero().flatten() for part in parts if not bool((mask := part.kept(keep)).all())}
        if kept:
            device = tensors[name].device
            cuts[name] = Cut(tensors[name], {axis: index.to(device) for axis, index in kept.items()})
    return cuts


def _reserve(cuts: Mapping[str, Cut]) -> None:
    """Raise now, while nothing has changed, if the memory for the largest new tensor cannot be had.

    Every later step frees at least as much as it takes.
    """
    for device in {cut.tensor.device for cut in cuts.values()}:
        mine = [cut for cut in cuts.values() if cut.tensor.device == device]
        largest = max(mine, key=lambda cut: prod(cut.shape) * cut.tensor.element_size())
        largest.tensor.new_empty(largest.shape)


def _commit(tensor: Tensor, cut: Cut) -> None:
    """The smaller tensor and its gradient in place of the old ones."""
    grad = None if tensor.grad is None else cut.apply(tensor.grad.to_dense())  # embeddings may have sparse gradients
    tensor.grad = None
    replace_data(tensor, cut.apply(tensor))
    tensor.grad = grad


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


def find_states(optimizer: torch.optim.Optimizer, cuts: Mapping[str, Cut]) -> list[tuple[dict[str, Any], str, Cut]]:
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
                found.append((state, key, cut))
    return found


def _weight_norms(cuts: Mapping[str, Cut], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Magnitudes of weight-normalised layers, before their own cut, so that the weights that stay are what they were.

    weight = g * v / ||v||: without its removed inputs v is shorter, and g shrinks in proportion.
    """
    rescaled = {}
    for name, cut in cuts.items():
        if not name.endswith(NORMED):
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
