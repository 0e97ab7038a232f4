"""Cut, find_cuts, find_states: what stays of each tensor and of the optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph.errors import PlanError
from etp_graph.plan import Plan, Positions

WEIGHT_NORM_DIRECTION = ".parametrizations.weight.original1"

_CHUNK = 1 << 20
"""Maximum number of elements of the pieces in which a tensor is cut along several axes."""


@dataclass(slots=True)
class Cut:
    """Positions of one tensor that stay, by axis."""

    tensor: Tensor
    kept: dict[int, Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the tensor after the cut."""
        return tuple(len(self.kept[d]) if d in self.kept else n for d, n in enumerate(self.tensor.shape))

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the kept part of a tensor of the original shape, in its memory format."""
        (first, rows), *others = sorted(self.kept.items())
        step = max(1, _CHUNK * tensor.shape[first] // max(1, tensor.numel()))
        if not others or step >= len(rows):
            return self._index_axes(tensor.detach(), rows).contiguous(memory_format=_memory_format(tensor))
        # cut in pieces, because a cut axis by axis would need an intermediate tensor besides the old and the new one
        out = torch.empty(self.shape, dtype=tensor.dtype, device=tensor.device, memory_format=_memory_format(tensor))
        for start, piece in zip(range(0, len(rows), step), rows.split(step), strict=True):
            out.narrow(first, start, len(piece)).copy_(self._index_axes(tensor.detach(), piece))
        return out

    def _index_axes(self, values: Tensor, rows: Tensor) -> Tensor:
        (first, _), *others = sorted(self.kept.items())
        out = values.index_select(first, rows)
        for axis, index in others:
            out = out.index_select(axis, index)
        return out


def _memory_format(tensor: Tensor) -> torch.memory_format:
    for form, ndim in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if tensor.ndim == ndim and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=form):
            return form
    return torch.contiguous_format


def find_cuts(plan: Plan, tensors: Mapping[str, Tensor], keep: Tensor) -> dict[str, Cut]:
    """Return the cut of each tensor that shrinks, given ``keep`` bool [n_units + 1] whose last entry is True."""
    cuts: dict[str, Cut] = {}
    for name, parts in Positions(plan).axes.items():
        kept = {
            part.axis: mask.nonzero().flatten() for part in parts if not bool((mask := part.kept_positions(keep)).all())
        }
        if kept:
            device = tensors[name].device
            cuts[name] = Cut(tensors[name], {axis: index.to(device) for axis, index in kept.items()})
    return cuts


def find_optimizer_states(
    optimizer: torch.optim.Optimizer, cuts: Mapping[str, Cut]
) -> list[tuple[dict[str, Any], str, Cut]]:
    """Return the entries (state, key, cut) of the optimizer's state that must be cut with their parameters.

    Raises:
        PlanError: an entry has another shape than its parameter, or the optimizer lacks a trainable parameter
            that is cut.
    """
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
