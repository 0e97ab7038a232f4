"""Sizes of views and of new tensors that the code computes from sizes of other activations or from attributes.

Surgery changes such a number if it removes units that it counts. That is right only if the axis of that size holds the
same units.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._labels import Labels, at_running_line
from ._traced_numbers import Origin, TracedInt


class ViewSizes:
    """The computed sizes of one trace.

    Attributes:
        read: (number of a size of an activation, attributes that the size is computed from besides, labels along the
            axis that it gives the size of, reason).
        derived: (attributes, labels [size] along the axis whose size is computed from them, reason).
    """

    def __init__(self) -> None:
        self.read: list[tuple[int, tuple[Origin, ...], Tensor | None, str]] = []
        self.derived: list[tuple[tuple[Origin, ...], Tensor | None, str]] = []

    def copy(self) -> ViewSizes:
        """Return a copy that later notes do not affect."""
        other = ViewSizes()
        other.read, other.derived = list(self.read), list(self.derived)
        return other

    def note(self, size: object, shape: torch.Size, dim: int, label: Tensor | None, reason: str) -> None:
        """Note that a number gives the size of dimension ``dim`` of a tensor with this shape and compact label."""
        if not isinstance(size, TracedInt) or not size.alive or not size.sources:
            return
        why = at_running_line(reason)
        along = None if label is None or label.shape[dim] == 1 else label.flatten()
        read = [source for source in size.sources if isinstance(source, int)]
        attributes = tuple(sorted((s for s in size.sources if not isinstance(s, int)), key=repr))
        self.read += [(source, attributes, along, why) for source in read]
        if not read and not size.is_read and (along is None or len(along) == shape[dim]):
            self.derived.append((attributes, along, why))

    def note_unlabelled(self, number: int, reason: str) -> None:
        """Note that the size of an activation, by its number, gives the size of an axis without units."""
        self.read.append((number, (), None, at_running_line(reason)))

    def lock_other_units(self, labels: Labels, label_of_size: Callable[[int], Tensor | None]) -> None:
        """Lock units whose number gives the size of an axis of other units, or of none, and those other units.

        Args:
            labels: labels of the trace.
            label_of_size: returns the labels of the units that a size counts, by its number, or ``None``.
        """
        sources = [label_of_size(number) for number, *_ in self.read]
        root = labels.roots() if any(source is not None for source in sources) else torch.zeros(0)
        for source, (_, attributes, along, why) in zip(sources, self.read, strict=True):
            if source is None:
                continue
            units = root[source[source > 0]]
            if along is None:  # a quotient of two numbers of the same units stays as it is
                counted = [ids for a in attributes if (ids := labels.attributes.get(a)) is not None]
                right = any(torch.equal(root[ids].unique(), units.unique()) for ids in counted)
            else:
                right = bool(torch.isin(root[along], units).all())
            for ids in () if right else (source, along):
                labels.lock(ids, why)

    def count_products(self, labels: Labels) -> None:
        """Unite the units along axes whose size is the same product or sum of attributes, which count them.

        Lock the units if the attributes do not, and units whose attribute gives the size of something else.
        """
        same: dict[tuple[tuple[Origin, ...], int], Tensor] = {}
        for attributes, along, why in self.derived:
            if along is not None:
                labels.unite(same.setdefault((attributes, len(along)), along), along, why)
        root = labels.roots() if self.derived else torch.zeros(0)
        for attributes, along, why in self.derived:
            counted = [ids for a in attributes if (ids := labels.attributes.get(a)) is not None]
            if along is None:
                right = len(counted) != 1  # a quotient of two numbers of the same units stays as it is
            else:
                whole = len(counted) == 1 or sum(map(len, counted)) == len(along)  # one of a product, all of a sum
                units = root[torch.cat(counted)] if counted else root[:0]
                right = whole and bool(torch.isin(units, root[along]).all())
                if right:  # what else lies there is a constant part of the sum
                    labels.lock(along[~torch.isin(root[along], units)], why)
            for ids in () if right else (along, *counted):
                labels.lock(ids, why)
