"""Unit labels: which unit each position of each tensor belongs to, and which units are one and the same.

Every dense layer creates one fresh label per output unit. Labels travel with the activations; wherever two of
them must live or die together (a residual add, a depthwise convolution) they are united, wherever a unit cannot
be removed it is locked with a reason. Label 0 means "no unit: this position has a fixed size".
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

TensorAxis = tuple[str, int]

AttributeKey = tuple[str, str, int | None]


@dataclass(frozen=True, slots=True)
class Producer:
    """A tensor axis whose positions are new units: its module and what the units are called."""

    axis: TensorAxis
    module: str
    kind: str


@dataclass(frozen=True, slots=True, eq=False)
class EqualRuns:
    """Runs of units that one number counts: they keep equally many, and at least ``floor`` each.

    Attributes:
        units: labels, int64 [runs, size].
        floor: least number of positions that each run keeps.
        where: the module, in words.
    """

    units: Tensor
    floor: int
    where: str


class Locks:
    """Which units may not be removed, and why; of several reasons for one unit the first stands.

    Attributes:
        code: the reason of each label by its number, int64 [number of labels]; 0: not locked.
        reasons: by number.
    """

    def __init__(self, n_labels: int) -> None:
        self.code = torch.zeros(n_labels, dtype=torch.int64, device="cpu")
        self.reasons: list[str | None] = [None]
        self._numbers: dict[str, int] = {}

    def add(self, units: Tensor, reason: str) -> None:
        """Lock the units that are not locked yet."""
        number = self._numbers.setdefault(reason, len(self.reasons))
        if number == len(self.reasons):
            self.reasons.append(reason)
        now = self.code[units]
        self.code[units] = torch.where(now > 0, now, number)

    def replace(self, units: Tensor, reason: str) -> None:
        """Lock the units for this reason alone, so that they form one group."""
        self.code[units] = 0
        self.add(units, reason)

    def first(self, units: Tensor) -> str | None:
        """The reason of the first unit that is locked, or ``None``."""
        found = self.code[units]
        return self.reasons[int(found[found > 0][0])] if bool((found > 0).any()) else None


@dataclass(slots=True)
class Labels:
    """The labels of one trace.

    Attributes:
        axes: labels [size] of every tensor axis that holds units.
        attributes: labels [value] of every module attribute that counts units.
        producers: in the order of execution.
        blocks: (labels [channels], number of runs that must stay equally long, module name).
        inputs: axes of dense layers that belong to the units that come in.
        passive: axes that are cut with their units but are no part of their norm.
        folded: labels of axes that a view folded into several, of which these units are one.
        headed: labels along which products of activations run side by side: the heads of an attention.
        normalised: labels over which a norm averages in every position.
        pinned: axes of bare parameters that are read at fixed positions.
        tables: bare parameters, whose every entry got a label of its own: name, first label, shape.
        ties: runs of units that keep equally many, by the axis that produces the first run.
        floors: labels of which at least so many must stay.
        multiples: labels of which a multiple of so many must stay.
        guesses: attributes that size a dimension of a bare parameter's view, which may turn out to hold units.
    """

    axes: dict[TensorAxis, Tensor] = field(default_factory=dict)
    attributes: dict[AttributeKey, Tensor] = field(default_factory=dict)
    producers: dict[TensorAxis, Producer] = field(default_factory=dict)
    blocks: list[tuple[Tensor, int, str]] = field(default_factory=list)
    inputs: set[TensorAxis] = field(default_factory=set)
    passive: set[TensorAxis] = field(default_factory=set)
    folded: list[Tensor] = field(default_factory=list)
    headed: list[Tensor] = field(default_factory=list)
    normalised: list[Tensor] = field(default_factory=list)
    pinned: dict[TensorAxis, str] = field(default_factory=dict)
    tables: list[tuple[str, int, torch.Size]] = field(default_factory=list)
    ties: dict[TensorAxis, EqualRuns] = field(default_factory=dict)
    floors: list[tuple[Tensor, int]] = field(default_factory=list)
    multiples: list[tuple[Tensor, int]] = field(default_factory=list)
    guesses: list[tuple[AttributeKey, Tensor, int]] = field(default_factory=list)
    _next: int = 1
    _pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _locks: list[tuple[Tensor, str]] = field(default_factory=list)

    def copy(self) -> Labels:
        """The same labels, which go their own way from here on."""
        return Labels(**{field.name: copy(getattr(self, field.name)) for field in fields(self)})

    def new_labels(self, size: int) -> Tensor:
        """New labels, int64 [size]."""
        first, self._next = self._next, self._next + size
        return torch.arange(first, first + size, device="cpu")

    def table(self, name: str, shape: torch.Size) -> Tensor:
        """Labels of a bare parameter: one for each entry, until it meets units along one of its axes."""
        self.tables.append((name, self._next, shape))
        return self.new_labels(shape.numel()).view(shape)

    def is_unbound(self, labels: Tensor) -> bool:
        """Whether the labels are all those of bare parameters that have met no units yet."""
        rest = labels[labels > 0]
        if rest.numel() and not any(first <= int(rest[0]) < first + shape.numel() for _, first, shape in self.tables):
            return False
        for _, first, shape in self.tables:
            rest = rest[(rest < first) | (rest >= first + shape.numel())]
        return not rest.numel()

    def pin(self, labels: Tensor, dim: int, reason: str) -> None:
        """Along ``dim`` these entries of bare parameters are at fixed positions: no units can lie there."""
        line = labels
        for d in range(labels.ndim):
            if d != dim:
                line = line.narrow(d, 0, 1)
        for name, first, shape in self.tables:
            inside = line[(line >= first) & (line < first + shape.numel())] - first
            for axis, at in enumerate(torch.unravel_index(inside, shape)):
                if at.numel() > 1 and bool((at != at[0]).any()):
                    self.pinned.setdefault((name, axis), reason)

    def produce(self, producer: Producer, size: int) -> Tensor:
        """The labels of a producing axis: fresh at its first use, the same at every later one."""
        if producer.axis not in self.axes:
            self.axes[producer.axis] = self.new_labels(size)
        self.producers.setdefault(producer.axis, producer)
        return self.axes[producer.axis]

    def unite(self, a: Tensor, b: Tensor, reason: str) -> Tensor:
        """Unite labels of equal shape position by position; a unit that meets a fixed position is locked."""
        if a is b or not bool((differ := a != b).any()):
            return a
        left, right = a[differ], b[differ]
        fixed = (left == 0) | (right == 0)
        if not bool(fixed.any()):
            self._pairs.append((left, right))
            return a
        self.lock(torch.maximum(left, right)[fixed], reason)
        self._pairs.append((left[~fixed], right[~fixed]))
        return torch.where(a == 0, b, a)

    def lock(self, labels: Tensor | None, reason: str) -> None:
        """No unit among the labels may be removed."""
        if labels is not None and bool((labels > 0).any()):
            self._locks.append((labels[labels > 0].unique(), reason))

    def add_axis(self, axis: TensorAxis, labels: Tensor) -> None:
        """A tensor axis holds these units; at a second call they are united with those of the first."""
        known = self.axes.get(axis)
        reason = f"{axis[0]} is shared with a layer whose channels are fixed"
        self.axes[axis] = labels if known is None else self.unite(known, labels, reason)

    def holds_whole_runs(self, label: Tensor, dim: int) -> bool:
        """Whether every position along ``dim`` holds whole runs of one tie: units go inside of it, it stays itself."""
        pieces = [set(piece.flatten().tolist()) for piece in label.unbind(dim)] if self.ties else []
        for tie in self.ties.values():
            runs = [set(run.tolist()) for run in tie.units]
            if all(piece == set().union(*(run for run in runs if run <= piece)) for piece in pieces):
                return True
        return False

    def merge(self, label: Tensor, dim: int, where: str) -> Tensor:
        """Unite what lies at equal places along ``dim``: the label, with size 1 there."""
        first = label.narrow(dim, 0, 1)
        self.unite(label, first.expand_as(label), f"meets channels of fixed width in {where}")
        return first

    def count(self, key: AttributeKey, labels: Tensor) -> None:
        """A module attribute counts these units; all the units that it counts in different places go together."""
        known = self.attributes.setdefault(key, labels)
        if known is labels:
            return
        reason = f"{key[0]}.{key[1]} also counts something of a fixed size"
        if known.shape == labels.shape:
            self.attributes[key] = self.unite(known, labels, reason)
        else:
            self.lock(known, reason)
            self.lock(labels, reason)

    def fold(self, labels: Tensor, survivors: Tensor, reason: str) -> None:
        """An axis is folded: units that differ only along the axes that do not survive go together."""
        self.folded.append(survivors.flatten())
        self.unite(labels, survivors.expand_as(labels), reason)

    def members(self, root: Tensor, found: list[Tensor]) -> Tensor:
        """Which representatives are among the labels found, bool [number of labels + 1]."""
        flags = torch.zeros(len(root), dtype=torch.bool, device="cpu")
        for labels in found:
            flags[root[labels[labels > 0]]] = True
        return flags

    def resolve(self) -> tuple[Tensor, Locks]:
        """The representative of every label, int64 [number of labels + 1], and which of them are locked."""
        root = torch.arange(self._next, device="cpu")
        if self._pairs:
            a = torch.cat([left for left, _ in self._pairs])
            b = torch.cat([right for _, right in self._pairs])
            root = components(self._next, a, b)
        locks = Locks(self._next)
        for labels, reason in self._locks:
            locks.add(root[labels], reason)
        return root, locks


def components(n: int, a: Tensor, b: Tensor) -> Tensor:
    """Connected components of the graph with edges a[i] - b[i]: the smallest member of each node's component, [n].

    Every round hangs roots below smaller ones and drops the edges inside a component: a logarithmic number of rounds.
    """
    root = torch.arange(n, device="cpu")
    while True:
        a, b = root[a], root[b]
        apart = a != b
        if not bool(apart.any()):
            return root
        a, b = a[apart], b[apart]
        root.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
        while not torch.equal(root, up := root[root]):
            root = up
