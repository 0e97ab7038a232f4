"""Cut and find_cuts: what stays of each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

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
        """Return the kept part of a tensor of the original shape, in its memory format. A sparse one stays sparse."""
        (first, rows), *others = sorted(self.kept.items())
        if tensor.layout == torch.sparse_coo:
            return self._index_axes(tensor.detach(), rows)
        if tensor.layout != torch.strided:
            return self.apply(tensor.detach().to_sparse_coo()).to_sparse(layout=tensor.layout)
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
        masks = {part.axis: part.kept_positions(keep) for part in parts}
        kept = {axis: index for axis, mask in masks.items() if len(index := mask.nonzero().flatten()) < len(mask)}
        if kept:
            device = tensors[name].device
            cuts[name] = Cut(tensors[name], {axis: index.to(device) for axis, index in kept.items()})
    return cuts
