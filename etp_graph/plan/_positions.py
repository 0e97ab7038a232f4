"""From slices to arrays: which unit each position of an axis holds. All of a plan at once, linear in its slices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import LongTensor, Tensor

from ._groups import Index, as_tensor
from ._plan import Plan

Ints = npt.NDArray[np.int64]


class PlacedUnits(NamedTuple):
    """Units at positions: ``unit`` numbers, counted from ``start``, at the positions ``at``."""

    at: Index
    unit: Index
    start: int


def maps_of(pieces: Sequence[PlacedUnits], size: int, nobody: int) -> list[LongTensor]:
    """The flat unit number at every position, int64 [size] each; ``nobody`` where there is none.

    One layer, unless positions hold several units at once: every piece goes into the first layer that has room for it.
    """
    one = np.full(size, nobody, dtype=np.int64)
    for piece in pieces:
        one[_at(piece.at)] = _numbers(piece)
    found = [one]
    if np.count_nonzero(one != nobody) < sum(len(piece.at) for piece in pieces):
        found = []
        for piece in pieces:
            _place(found, piece, size, nobody)
    return [torch.from_numpy(layer) for layer in found]  # type: ignore[misc]


def index_length(indices: Iterable[Index]) -> int:
    """The number of positions up to the last one that an index names."""
    return 1 + max(index[-1] if isinstance(index, range) else int(index.max()) for index in indices)


def _place(found: list[Ints], piece: PlacedUnits, size: int, nobody: int) -> None:
    at = _at(piece.at)
    for layer in found:
        if (layer[at] == nobody).all():
            layer[at] = _numbers(piece)
            return
    layer = np.full(size, nobody, dtype=np.int64)
    layer[at] = _numbers(piece)
    found.append(layer)


def _at(index: Index) -> slice | Ints:
    return slice(index.start, index.stop, index.step) if isinstance(index, range) else index.numpy()


def _numbers(piece: PlacedUnits) -> Ints:
    if isinstance(piece.unit, range):
        first, last, step = piece.unit.start, piece.unit.stop, piece.unit.step
        return np.arange(first + piece.start, last + piece.start, step, dtype=np.int64)
    return np.asarray(piece.unit.numpy() + piece.start)


@dataclass(frozen=True, slots=True)
class SlicedAxis:
    """One sliced axis of one tensor: ``layers`` of flat unit numbers, each int64 [size of the axis]."""

    tensor: str
    axis: int
    maps: tuple[LongTensor, ...]

    def kept_positions(self, keep: Tensor) -> Tensor:
        """Which positions stay, bool [size], given ``keep`` bool [n_units + 1] whose last entry is True."""
        mask = keep[self.maps[0]]
        for layer in self.maps[1:]:
            mask = mask & keep[layer]
        return mask

    def spread(self, values: Tensor) -> Tensor:
        """Product over the layers of ``values`` [n_units + 1] at each position, shape [size]."""
        out = values[self.maps[0]]
        for layer in self.maps[1:]:
            out = out * values[layer]
        return out

    def product_over_axes(self, values: Tensor, ndim: int) -> Tensor:
        """:meth:`spread`, shaped to broadcast against a tensor of ``ndim`` dimensions."""
        shape = [1] * ndim
        shape[self.axis] = -1
        return self.spread(values).view(shape)


def sliced_axes(
    plan: Plan, device: torch.device | str = "cpu", *, passive: bool = True, locked: bool = True
) -> dict[str, tuple[SlicedAxis, ...]]:
    """Every sliced axis of every tensor of the plan, with its index tensors on ``device``.

    Without ``passive`` those slices are left out that are cut with their units but are no part of their norm; without
    ``locked`` all those of locked groups.
    """
    pieces: dict[tuple[str, int], list[PlacedUnits]] = {}
    for group, span in plan.spans():
        if group.locked is not None and not locked:
            continue
        for piece in group.slices:
            if passive or not piece.passive:
                held = pieces.setdefault((piece.tensor, piece.axis), [])
                held.append(PlacedUnits(piece.index, piece.unit, span.start))
    found: dict[str, list[SlicedAxis]] = {}
    for (tensor, axis), held in pieces.items():
        maps = maps_of(held, plan.tensors[tensor][axis], plan.n_units)
        found.setdefault(tensor, []).append(SlicedAxis(tensor, axis, tuple(m.to(device) for m in maps)))  # type: ignore
    return {tensor: tuple(parts) for tensor, parts in found.items()}


def attribute_units(plan: Plan, *, locked: bool = True) -> dict[tuple[str, str, int | None], list[LongTensor]]:
    """For each counted attribute (module, name, item) the layers [number of positions] of flat unit numbers.

    Without ``locked`` those of locked groups are left out.
    """
    found: dict[tuple[str, str, int | None], list[PlacedUnits]] = {}
    for group, span in plan.spans():
        for a in group.attributes if locked or group.locked is None else ():
            found.setdefault((a.module, a.name, a.item), []).append(PlacedUnits(a.index, a.unit, span.start))
    return {key: maps_of(held, index_length(p.at for p in held), plan.n_units) for key, held in found.items()}


def with_no_unit(values: Tensor, neutral: float | bool) -> Tensor:
    """``values`` [n_units] with one more entry for positions that belong to no unit."""
    return torch.cat([values, values.new_full((1,), neutral)])


def numbers_per_unit(plan: Plan) -> Tensor:
    """How many numbers each unit owns, float [n_units]."""
    total, parameters = torch.zeros(plan.n_units, device="cpu"), set(plan.parameters)
    for group, span in plan.spans():
        for piece in group.slices:
            if piece.tensor in parameters and not piece.passive:
                shape, units = plan.tensors[piece.tensor], as_tensor(piece.unit)
                rest = float(prod(shape) // max(shape[piece.axis], 1))
                total[span].index_add_(0, units, torch.full((len(units),), rest, device="cpu"))
    return total
