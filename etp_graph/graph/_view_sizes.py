"""Sizes that the code computes from sizes of activations or from attributes, for views, pieces and new tensors.

Surgery changes such a number if it removes units that it counts. That is right only if the axis of that size then loses
as many positions. The computation is run again with fewer units to find out. The same tells how far two widths that
the code compares may shrink.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from etp_graph.graph.rules._operators import labelled_dims

from ._labels import Labels, at_running_line
from ._traced_numbers import Numbers, Origin, SizeInt, Source, TracedInt


@dataclass(frozen=True, slots=True)
class ViewSize:
    """A computed size, and the axis that has it.

    Attributes:
        size: the number; negative if it is counted from the end.
        read: numbers of the sizes of activations that it is computed from.
        attributes: the attributes that it is computed from.
        along: labels along the axis, ``None`` if it holds no units.
        whole: whether ``along`` has one entry for each position of the axis.
        why: reason, if its units are locked.
    """

    size: TracedInt
    read: tuple[int, ...]
    attributes: tuple[Origin, ...]
    along: Tensor | None
    whole: bool
    why: str


class ViewSizes:
    """The computed sizes of one trace.

    Attributes:
        read: the sizes that are computed from sizes of activations, and maybe attributes.
        derived: the sizes that are computed from attributes alone.
    """

    def __init__(self) -> None:
        self.read: list[ViewSize] = []
        self.derived: list[ViewSize] = []

    def copy(self) -> ViewSizes:
        """Return a copy that later notes do not affect."""
        other = ViewSizes()
        other.read, other.derived = list(self.read), list(self.derived)
        return other

    def note(self, size: object, shape: torch.Size, dim: int, label: Tensor | None, reason: str) -> None:
        """Note that a number gives the size of dimension ``dim`` of a tensor with this shape and compact label."""
        if not isinstance(size, TracedInt) or not size.alive or not size.sources:
            return
        along = None if label is None or label.shape[dim] == 1 else label.flatten()
        read = tuple(source for source in size.sources if isinstance(source, int))
        attributes = tuple(sorted((s for s in size.sources if not isinstance(s, int)), key=repr))
        whole = along is None or len(along) == shape[dim]
        found = ViewSize(size, read, attributes, along, whole, at_running_line(reason))
        if read:
            self.read.append(found)
        elif not size.is_read and whole:
            self.derived.append(found)

    def note_unlabelled(self, number: int, reason: str) -> None:
        """Note that the size of an activation, by its number, gives the size of an axis without units."""
        size = SizeInt(1, frozenset((number,)))  # only the change counts
        self.read.append(ViewSize(size, (number,), (), None, True, at_running_line(reason)))

    def lock_other_units(self, labels: Labels, label_of_size: Callable[[int], Tensor | None]) -> None:
        """Lock units whose number gives the size of an axis of other units, or of none, and those other units.

        Args:
            labels: labels of the trace.
            label_of_size: returns the labels of the units that a size counts, by its number, or ``None``.
        """
        sources = {number: label_of_size(number) for use in self.read for number in use.read}
        units: dict[Source, Tensor] = {number: ids for number, ids in sources.items() if ids is not None}
        root = labels.roots() if units else torch.zeros(0, device="cpu")
        for use in self.read:
            if not any(number in units for number in use.read):
                continue
            if (wrong := _wrong_units(use, {**_counted(use, labels), **units}, root)) is not None:
                labels.lock(wrong, use.why)
                continue
            for number in use.read:
                if number in units and not self._is_right(use, units[number], labels, root):
                    labels.lock(units[number], use.why)
                    labels.lock(use.along, use.why)

    @staticmethod
    def _is_right(use: ViewSize, source: Tensor, labels: Labels, root: Tensor) -> bool:
        """Return whether a size, whose computation is not known, can follow the units of one that it comes from."""
        units = root[source[source > 0]]
        if use.along is not None:
            return bool(torch.isin(root[use.along], units).all())
        # A quotient of two numbers of the same units stays as it is.
        return any(torch.equal(root[ids].unique(), units.unique()) for ids in _counted(use, labels).values())

    def count_products(self, labels: Labels) -> None:
        """Unite the units along axes whose size is the same product or sum of attributes, which count them.

        Lock the units if the attributes do not, and units whose attribute gives the size of something else.
        """
        same: dict[tuple[tuple[Origin, ...], int], Tensor] = {}
        for use in self.derived:
            if use.along is not None:
                labels.unite(same.setdefault((use.attributes, int(use.size)), use.along), use.along, use.why)
        root = labels.roots() if self.derived else torch.zeros(0, device="cpu")
        for use in self.derived:
            counted = _counted(use, labels)
            wrong = _wrong_units(use, counted, root)
            for ids in (use.along, *counted.values()) if wrong is None else (wrong,):
                labels.lock(ids, use.why)


def _counted(use: ViewSize, labels: Labels) -> dict[Source, Tensor]:
    """Return the labels of the units that the attributes of a size count."""
    return {key: ids for key in use.attributes if (ids := labels.attributes.get(key)) is not None}


def _wrong_units(use: ViewSize, counted: Mapping[Source, Tensor], root: Tensor) -> Tensor | None:
    """Return the units whose removal would give the axis another number of positions than the computation does.

    Args:
        use: the size and its axis.
        counted: compact labels of the units that the sources of the size count.
        root: number of the unit of each label.

    Returns:
        Numbers of units, or ``None`` if the computation is not known.
    """
    sources = [source for source in use.size.sources if source in counted]
    if not use.whole or any(len(labelled_dims(counted[source])) > 1 for source in sources):
        return None
    axes = [root[counted[source].flatten()] for source in sources]
    axes.append(root[use.along] if use.along is not None else root[:0])
    units = torch.cat(axes).unique()
    units = units[units > 0]
    places = [torch.searchsorted(units, axis[axis > 0]) for axis in axes]
    held = torch.stack([torch.bincount(place, minlength=len(units)) for place in places], 1)  # on each axis
    kinds, kind_of, members = held.unique(dim=0, return_inverse=True, return_counts=True)
    bad = torch.zeros(len(kinds), dtype=torch.bool, device="cpu")
    sign = -1 if int(use.size) < 0 else 1
    for kind, (row, n) in enumerate(zip(kinds.tolist(), members.tolist(), strict=True)):
        for k in sorted({k for k in (1, 2, 3, 5, n - 1) if 0 < k <= n}):
            size = use.size.after({source: k * lost for source, lost in zip(sources, row, strict=False)})
            if size is None:
                return None
            bad[kind] |= size != int(use.size) - sign * k * row[-1]
    wrong: Tensor = units[bad[kind_of]]
    return wrong


def keep_widths_apart(
    labels: Labels, numbers: Numbers, label_of_source: Callable[[Source], Tensor | None]
) -> list[str]:
    """Let the larger one of two widths that the code compares stay the larger one, and return the lines.

    Equal widths would take another branch (``if x.shape != y.shape: x = self.project(x)``).

    Args:
        labels: labels of the trace; the least numbers of units are noted there.
        numbers: the comparisons.
        label_of_source: returns the labels of the units that a source counts, or ``None``.
    """
    root = labels.roots() if numbers.differ else torch.zeros(0, device="cpu")

    def units_of(source: Source) -> Tensor | None:
        label = label_of_source(source)
        return None if label is None or len(labelled_dims(label)) > 1 else root[label].flatten().sort()[0]

    lines = set()
    for larger, smaller, line in numbers.differ:
        others = [units_of(source) for source in getattr(smaller, "sources", ())]
        for source in larger.sources:
            units = units_of(source)
            if units is not None and not any(o is not None and torch.equal(units, o) for o in others):
                labels.floors.append((units, _fewest(larger, smaller, source, units)))
                lines |= set() if line is None else {line}
    return sorted(lines)


def _fewest(larger: TracedInt, smaller: int, source: Source, units: Tensor) -> int:
    """Return how many units of a source must stay, so that a number that is computed from it stays the larger one.

    All, if the number has other sources, too, or if its computation is not known.
    """
    n_units, at_once = len(units.unique()), int(units.unique(return_counts=True)[1].max())
    removable = 0
    for removed in range(at_once, n_units * at_once, at_once) if len(larger.sources) == 1 else ():
        left = larger.after({source: removed})
        if left is None or left <= int(smaller):
            break
        removable += 1
    return n_units - removable
