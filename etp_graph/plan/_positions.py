"""Turn slices into arrays that hold the unit number of each position of an axis."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import prod
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import LongTensor, Tensor

from ._groups import Group, Index, as_tensor, index_length
from ._plan import Plan

Ints = npt.NDArray[np.int64]

T = TypeVar("T")

NO_UNIT = -1
"""Number that stands for "no unit", "no group" and "no level" wherever such numbers are stored.

As an index it reads the last entry of a vector, which is the neutral one that :func:`with_no_unit` appends.
"""


class PlacedUnits(NamedTuple):
    """Units of one slice: position ``at[i]`` holds the unit with the flat number ``start + unit[i]``."""

    at: Index
    unit: Index
    start: int


def maps_of(pieces: Sequence[PlacedUnits], size: int) -> list[LongTensor]:
    """Return maps of the flat unit number at every position, each int64 [size]; :data:`NO_UNIT` where there is none.

    One map is enough unless positions hold several units at once. Each piece is then written to the first map in which
    its positions are free.
    """
    one = np.full(size, NO_UNIT, dtype=np.int64)
    for piece in pieces:
        one[_as_numpy_index(piece.at)] = _flat_numbers(piece)
    found = [one]
    if np.count_nonzero(one != NO_UNIT) < sum(len(piece.at) for piece in pieces):
        found = []
        for piece in pieces:
            _place_units(found, piece, size)
    return [torch.from_numpy(layer) for layer in found]  # type: ignore[misc]


def _place_units(found: list[Ints], piece: PlacedUnits, size: int) -> None:
    at = _as_numpy_index(piece.at)
    for layer in found:
        if (layer[at] == NO_UNIT).all():
            layer[at] = _flat_numbers(piece)
            return
    layer = np.full(size, NO_UNIT, dtype=np.int64)
    layer[at] = _flat_numbers(piece)
    found.append(layer)


def _as_numpy_index(index: Index) -> slice | Ints:
    return slice(index.start, index.stop, index.step) if isinstance(index, range) else index.numpy()


def _flat_numbers(piece: PlacedUnits) -> Ints:
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


_KNOWN: WeakKeyDictionary[Plan, dict[Any, Any]] = WeakKeyDictionary()
"""Maps that were made for a plan. Surgery, masking and costs of one plan read the same ones."""

_MANY = 2**22
"""Number of positions of all sliced axes up to which the maps of a plan are kept as long as the plan."""


class Positions:
    """Which units lie at the positions of a plan's tensors and attributes: the one owner of index arithmetic.

    Args:
        plan: the plan.
        device: device of the maps of tensors.
        passive: whether to include slices that are cut with their units but are no part of their norm.
        locked: whether to include slices and attributes of locked groups.
    """

    def __init__(
        self, plan: Plan, device: torch.device | str = "cpu", *, passive: bool = True, locked: bool = True
    ) -> None:
        self.plan, self.device, self.passive, self.locked = plan, device, passive, locked

    @cached_property
    def axes(self) -> dict[str, tuple[SlicedAxis, ...]]:
        """The sliced axes of each tensor, by its name."""
        known = self._known("axes", self._cpu_axes, _layers_of_axes)
        if torch.device(self.device).type == "cpu":
            return known
        return {
            tensor: tuple(SlicedAxis(part.tensor, part.axis, self._moved(part.maps)) for part in parts)
            for tensor, parts in known.items()
        }

    def _moved(self, maps: tuple[LongTensor, ...]) -> tuple[LongTensor, ...]:
        return tuple(layer.to(self.device) for layer in maps)  # type: ignore[misc]

    def _known(self, what: str, make: Callable[[], T], layers: Callable[[T], Iterator[Tensor]]) -> T:
        """Return what was made for this plan before, if any. Plans of very many positions are not remembered."""
        kept = _KNOWN.setdefault(self.plan, {})
        key = what, self.passive, self.locked
        if key in kept:
            found: T = kept[key]
            return found
        found = make()
        if sum(len(layer) for layer in layers(found)) <= _MANY:
            kept[key] = found
        return found

    def _cpu_axes(self) -> dict[str, tuple[SlicedAxis, ...]]:
        pieces: dict[tuple[str, int], list[PlacedUnits]] = {}
        for group, start in self._included_groups():
            for piece in group.slices:
                if self.passive or not piece.passive:
                    held = pieces.setdefault((piece.tensor, piece.axis), [])
                    held.append(PlacedUnits(piece.index, piece.unit, start))
        found: dict[str, list[SlicedAxis]] = {}
        for (tensor, axis), held in pieces.items():
            maps = tuple(maps_of(held, self.plan.tensors[tensor][axis]))
            found.setdefault(tensor, []).append(SlicedAxis(tensor, axis, maps))
        return {tensor: tuple(parts) for tensor, parts in found.items()}

    @cached_property
    def attributes(self) -> dict[tuple[str, str, int | None], list[LongTensor]]:
        """The maps [number of positions] of each counted attribute, by (module, name, item)."""
        return self._known("attributes", self._made_attributes, lambda found: chain.from_iterable(found.values()))

    def _made_attributes(self) -> dict[tuple[str, str, int | None], list[LongTensor]]:
        found: dict[tuple[str, str, int | None], list[PlacedUnits]] = {}
        for group, start in self._included_groups():
            for a in group.attributes:
                found.setdefault((a.module, a.name, a.item), []).append(PlacedUnits(a.index, a.unit, start))
        return {key: maps_of(held, index_length(p.at for p in held)) for key, held in found.items()}

    def _included_groups(self) -> Iterator[tuple[Group, int]]:
        """The groups to include, each with the flat number of its first unit."""
        for group, span in self.plan.spans():
            if self.locked or group.locked is None:
                yield group, span.start


def _layers_of_axes(axes: dict[str, tuple[SlicedAxis, ...]]) -> Iterator[Tensor]:
    return chain.from_iterable(part.maps for parts in axes.values() for part in parts)


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
