"""Turn slices into arrays that hold the unit number of each position of an axis."""

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
    """Units of one slice: position ``at[i]`` holds the unit with the flat number ``start + unit[i]``."""

    at: Index
    unit: Index
    start: int


def maps_of(pieces: Sequence[PlacedUnits], size: int, nobody: int) -> list[LongTensor]:
    """Return layers of the flat unit number at every position, each int64 [size]; ``nobody`` means no unit.

    One layer is enough unless positions hold several units at once. Each piece is then written to the first layer in
    which its positions are free.
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
    """Return the smallest axis length that contains all positions of the indices."""
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
    """Sliced axis of one tensor: ``layers`` of flat unit numbers, each int64 [size of the axis]."""

    tensor: str
    axis: int
    maps: tuple[LongTensor, ...]

    def kept_positions(self, keep: Tensor) -> Tensor:
        """Mark positions whose units all stay, bool [size]; the last entry of ``keep``, bool [n_units + 1], is True."""
        mask = keep[self.maps[0]]
        for layer in self.maps[1:]:
            mask = mask & keep[layer]
        return mask

    def spread(self, values: Tensor) -> Tensor:
        """Return at each position the product of ``values`` [n_units + 1] over its units, shape [size]."""
        out = values[self.maps[0]]
        for layer in self.maps[1:]:
            out = out * values[layer]
        return out

    def product_over_axes(self, values: Tensor, ndim: int) -> Tensor:
        """Return :meth:`spread`, shaped to broadcast against a tensor of ``ndim`` dimensions."""
        shape = [1] * ndim
        shape[self.axis] = -1
        return self.spread(values).view(shape)


def sliced_axes(
    plan: Plan, device: torch.device | str = "cpu", *, passive: bool = True, locked: bool = True
) -> dict[str, tuple[SlicedAxis, ...]]:
    """Return every sliced axis of every tensor of the plan, with its index tensors on ``device``.

    If ``passive`` is False, slices that surgery cuts but that do not count in the norm of their units are left out.
    If ``locked`` is False, slices of locked groups are left out.
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
    """Return for each attribute (module, name, item) the layers of flat unit numbers that it counts.

    Each layer is int64 [number of positions]. If ``locked`` is False, attributes of locked groups are left out.
    """
    found: dict[tuple[str, str, int | None], list[PlacedUnits]] = {}
    for group, span in plan.spans():
        for a in group.attributes if locked or group.locked is None else ():
            found.setdefault((a.module, a.name, a.item), []).append(PlacedUnits(a.index, a.unit, span.start))
    return {key: maps_of(held, index_length(p.at for p in held), plan.n_units) for key, held in found.items()}


def with_no_unit(values: Tensor, neutral: float | bool) -> Tensor:
    """Append to ``values`` [n_units] one neutral entry for positions that belong to no unit."""
    return torch.cat([values, values.new_full((1,), neutral)])


def numbers_per_unit(plan: Plan) -> Tensor:
    """Return the number of parameter elements of each unit, float [n_units]; passive slices do not count."""
    total, parameters = torch.zeros(plan.n_units, device="cpu"), set(plan.parameters)
    for group, span in plan.spans():
        for piece in group.slices:
            if piece.tensor in parameters and not piece.passive:
                shape, units = plan.tensors[piece.tensor], as_tensor(piece.unit)
                rest = float(prod(shape) // max(shape[piece.axis], 1))
                total[span].index_add_(0, units, torch.full((len(units),), rest, device="cpu"))
    return total
