"""Unit labels: integers that say which unit each position of each tensor belongs to.

Every dense layer creates one new label per output unit. Labels are passed along with the activations. Labels that can
only be removed together (at a residual add, in a depthwise convolution) are united into one unit. A unit that cannot
be removed is locked, with a reason. Label 0 means that a position belongs to no unit and has a fixed size.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from etp_graph.model import running_line
from etp_graph.plan import add_line, without_line

FEEDS_OUTPUT = "feeds the model's output"
"""Lock reason of units that the model's outputs show."""

REPEATED = "is repeated for query heads"
"""How the lock reason of heads begins in the reading whose units are their copies."""

Reading = Literal["inner", "outer"]
"""Reading of a folded unit axis: which of the axes that a view makes of it holds the units."""

TensorAxis = tuple[str, int]

AttributeKey = tuple[str, str, int | None]


@dataclass(frozen=True, slots=True)
class Producer:
    """Tensor axis whose positions are new units, with its module and the kind of the units."""

    axis: TensorAxis
    module: str
    kind: str


@dataclass(frozen=True, slots=True, eq=False)
class EqualRuns:
    """Runs of consecutive units that share one size attribute (``hidden_size`` of an LSTM with several layers).

    All runs must keep the same number of units.

    Attributes:
        units: labels, int64 [runs, size].
        floor: minimum number of units that each run keeps.
        where: the module, for messages.
        line: the line of the model's code that calls it, for messages.
    """

    units: Tensor
    floor: int
    where: str
    line: str | None = None


class Locks:
    """Units that may not be removed, with one reason each. If several reasons apply, the first one is kept.

    Attributes:
        code: number of the reason of each label, int64 [n_labels]; 0: not locked.
        reasons: the reasons, by number.
        kinds: for each reason the number of the first one that differs from it in the line of the code alone.
    """

    def __init__(self, n_labels: int) -> None:
        self.code = torch.zeros(n_labels, dtype=torch.int64, device="cpu")
        self.reasons: list[str | None] = [None]
        self.kinds: list[int] = [0]
        self._numbers: dict[str, int] = {}
        self._kind_of: dict[str, int] = {}

    def add(self, units: Tensor, reason: str) -> None:
        """Lock the units that are not locked yet."""
        number = self._numbers.setdefault(reason, len(self.reasons))
        if number == len(self.reasons):
            self.reasons.append(reason)
            self.kinds.append(self._kind_of.setdefault(without_line(reason), number))
        now = self.code[units]
        self.code[units] = torch.where(now > 0, now, number)

    def replace(self, units: Tensor, reason: str) -> None:
        """Lock the units for this reason only. Units with different reasons would form different groups."""
        self.code[units] = 0
        self.add(units, reason)

    def first(self, units: Tensor) -> str | None:
        """Return the reason of the first locked unit, or ``None``."""
        found = self.code[units]
        return self.reasons[int(found[found > 0][0])] if bool((found > 0).any()) else None


@dataclass(slots=True)
class Labels:
    """Labels of one trace.

    Attributes:
        axes: labels [size] of every tensor axis that holds units.
        attributes: labels [value] of every module attribute that counts units.
        producers: axes that produce units, in the order of execution.
        blocks: (labels [channels], number of blocks, module name, line of the code); the blocks must keep equal sizes
            (group norm).
        inputs: axes of dense layers that hold their input units.
        passive: axes that surgery cuts with their units, but that do not count in the norm of the units.
        folded: labels of the units that are left when a view folds a unit axis into several axes.
        headed: labels of units that may be heads, such as those along the batch dimensions of products of activations.
        normalised: labels of the units that a norm averages over.
        added: labels of sums of two activations.
        pinned: axes of bare parameters that are read at fixed positions, each with a reason.
        tables: (name, first label, shape) of every bare parameter; each of its entries has a label.
        read_at: name of a bare parameter -> line of the model's code that reads it first.
        ties: the ties, by the axis that produces the first run.
        floors: (labels, n): at least n of these units must stay.
        multiples: (labels, n): the number of these units that stay must be a multiple of n.
        guesses: (attribute, labels, dimension) of views of bare parameters. The attribute gives the size of the
            dimension, and counts units if the dimension turns out to hold units.
        reading: the reading that these labels belong to; ``None`` until a call depends on it.
        by_copy: in the outer reading, whether heads of keys are repeated for query heads and the units are the copies:
            copy j of every head. Otherwise the units are the heads that are repeated. ``None`` until a call depends on
            it.
        copies: labels of the copies.
        originals: labels of the heads whose copies are units.
        shown: (entry, labels) of every tensor that counts as an output of the model.
    """

    axes: dict[TensorAxis, Tensor] = field(default_factory=dict)
    attributes: dict[AttributeKey, Tensor] = field(default_factory=dict)
    producers: dict[TensorAxis, Producer] = field(default_factory=dict)
    blocks: list[tuple[Tensor, int, str, str | None]] = field(default_factory=list)
    inputs: set[TensorAxis] = field(default_factory=set)
    passive: set[TensorAxis] = field(default_factory=set)
    folded: list[Tensor] = field(default_factory=list)
    headed: list[Tensor] = field(default_factory=list)
    normalised: list[Tensor] = field(default_factory=list)
    added: list[Tensor] = field(default_factory=list)
    pinned: dict[TensorAxis, str] = field(default_factory=dict)
    tables: list[tuple[str, int, torch.Size]] = field(default_factory=list)
    read_at: dict[str, str | None] = field(default_factory=dict)
    ties: dict[TensorAxis, EqualRuns] = field(default_factory=dict)
    floors: list[tuple[Tensor, int]] = field(default_factory=list)
    multiples: list[tuple[Tensor, int]] = field(default_factory=list)
    guesses: list[tuple[AttributeKey, Tensor, int]] = field(default_factory=list)
    shown: list[tuple[str, Tensor]] = field(default_factory=list)
    reading: Reading | None = None
    by_copy: bool | None = None
    copies: list[Tensor] = field(default_factory=list)
    originals: list[Tensor] = field(default_factory=list)
    _next: int = 1
    _pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _locks: list[tuple[Tensor, str]] = field(default_factory=list)
    _roots: tuple[tuple[int, int], Tensor] | None = None

    def copy(self) -> Labels:
        """Return a copy that later changes of these labels do not affect."""
        return Labels(**{field.name: copy(getattr(self, field.name)) for field in fields(self)})

    def new_labels(self, size: int) -> Tensor:
        """Return new labels, int64 [size]."""
        first, self._next = self._next, self._next + size
        return torch.arange(first, first + size, device="cpu")

    def label_entries(self, name: str, shape: torch.Size) -> Tensor:
        """Return a new label for each entry of a bare parameter. Entries are united when the parameter meets units."""
        self.tables.append((name, self._next, shape))
        self.read_at[name] = running_line()
        return self.new_labels(shape.numel()).view(shape)

    def is_unbound(self, labels: Tensor) -> bool:
        """Return True if all labels other than 0 were made by :meth:`table`."""
        rest = labels[labels > 0]
        if not rest.numel():
            return True
        some = int(rest[0])
        if not any(first <= some < first + shape.numel() for _, first, shape in self.tables):
            return False
        starts = torch.tensor([first for _, first, _ in self.tables], device="cpu")
        ends = torch.tensor([first + shape.numel() for _, first, shape in self.tables], device="cpu")
        order = starts.argsort()
        at = torch.searchsorted(starts[order], rest, right=True) - 1
        return bool(((at >= 0) & (rest < ends[order][at.clamp(min=0)])).all())

    def pin_axes(self, labels: Tensor, dim: int, reason: str) -> None:
        """Pin each axis of a bare parameter that lies along ``dim``. Units on a pinned axis are locked later."""
        line = labels
        for d in range(labels.ndim):
            if d != dim:
                line = line.narrow(d, 0, 1)
        for name, first, shape in self.tables:
            inside = line[(line >= first) & (line < first + shape.numel())] - first
            for axis, at in enumerate(torch.unravel_index(inside, shape)):
                if at.numel() > 1 and bool((at != at[0]).any()):
                    self.pinned.setdefault((name, axis), at_running_line(reason))

    def produce(self, producer: Producer, size: int) -> Tensor:
        """Return the labels of a producing axis. The first use creates them, later uses get the same labels."""
        if producer.axis not in self.axes:
            self.axes[producer.axis] = self.new_labels(size)
        self.producers.setdefault(producer.axis, producer)
        return self.axes[producer.axis]

    def unite(self, a: Tensor, b: Tensor, reason: str) -> Tensor:
        """Unite labels of equal shape position by position, and return the result. Lock units that meet a label 0."""
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
        """Lock all units among the labels. The reason gets the line of the model's code that runs, if it has none."""
        if labels is not None and bool((labels > 0).any()):
            self._locks.append((labels[labels > 0].unique(), at_running_line(reason)))

    def add_axis(self, axis: TensorAxis, labels: Tensor) -> None:
        """Record that a tensor axis holds these units. If it has units already, unite them with these."""
        known = self.axes.get(axis)
        reason = f"{axis[0]} is shared with a layer whose channels are fixed"
        self.axes[axis] = labels if known is None else self.unite(known, labels, reason)

    def is_copy(self, labels: Tensor | None) -> bool:
        """Return True if the labels are those of copies of heads, or of heads of a group."""
        return labels is not None and bool(self.copies) and bool(torch.isin(labels, torch.cat(self.copies)).any())

    def is_folded(self, labels: Tensor) -> bool:
        """Return True if the labels are those of units that were left when a view folded their axis."""
        return bool(self.folded) and bool(torch.isin(labels[labels > 0], torch.cat(self.folded)).all())

    def holds_whole_runs(self, label: Tensor, dim: int) -> bool:
        """Return True if each position along ``dim`` holds complete runs of one tie.

        Units are then removed within each position, so that the length of ``dim`` does not change.
        """
        pieces = [set(piece.flatten().tolist()) for piece in label.unbind(dim)] if self.ties else []
        for tie in self.ties.values():
            runs = [set(run.tolist()) for run in tie.units]
            if all(piece == set().union(*(run for run in runs if run <= piece)) for piece in pieces):
                return True
        return False

    def merge_dim(self, label: Tensor, dim: int, where: str) -> Tensor:
        """Unite all positions along ``dim``. Return the label of the first one, with size 1 along ``dim``."""
        first = label.narrow(dim, 0, 1)
        self.unite(label, first.expand_as(label), f"meets channels of fixed width in {where}")
        return first

    def count(self, key: AttributeKey, labels: Tensor) -> None:
        """Record that a module attribute counts these units.

        Units that it counts in different places are united. If their numbers differ, they are locked.
        """
        known = self.attributes.setdefault(key, labels)
        if known is labels:
            return
        reason = f"{key[0]}.{key[1]} also counts something of a fixed size"
        if known.shape == labels.shape:
            self.attributes[key] = self.unite(known, labels, reason)
        else:
            self.lock(known, reason)
            self.lock(labels, reason)

    def fold_axis(self, labels: Tensor, survivors: Tensor, reason: str) -> None:
        """Record that an axis is folded into several axes, and unite units that differ only along its fixed axes.

        ``survivors`` are the labels along the other axes, and broadcast to ``labels``.
        """
        self.folded.append(survivors.flatten())
        self.unite(labels, survivors.expand_as(labels), reason)

    def mark_members(self, root: Tensor, found: list[Tensor]) -> Tensor:
        """Mark the representatives of the labels found, bool [number of labels + 1]."""
        flags = torch.zeros(len(root), dtype=torch.bool, device="cpu")
        for labels in found:
            flags[root[labels[labels > 0]]] = True
        return flags

    def locked_only_for(self, reason: str, root: Tensor) -> Tensor:
        """Mark the representatives that are locked for this reason and no other, bool [number of labels + 1]."""
        marks = {same: torch.zeros(len(root), dtype=torch.bool, device="cpu") for same in (True, False)}
        for labels, why in self._locks:
            marks[why == reason][root[labels]] = True
        return marks[True] & ~marks[False]

    def roots(self) -> Tensor:
        """Return the representative of every label, int64 [number of labels + 1]."""
        state = len(self._pairs), self._next
        if self._roots is None or self._roots[0] != state:
            root = torch.arange(self._next, device="cpu")
            if self._pairs:
                a = torch.cat([left for left, _ in self._pairs])
                b = torch.cat([right for _, right in self._pairs])
                root = connected_components(self._next, a, b)
            self._roots = state, root
        return self._roots[1]

    def resolve(self) -> tuple[Tensor, Locks]:
        """Return the representative of every label, int64 [number of labels + 1], and their locks."""
        root, locks = self.roots(), Locks(self._next)
        for labels, reason in self._locks:
            locks.add(root[labels], reason)
        return root, locks


def at_running_line(reason: str) -> str:
    """Append the line of the model's code that runs to a reason that names none."""
    return add_line(reason, running_line())


def connected_components(n: int, a: Tensor, b: Tensor) -> Tensor:
    """Find the connected components of the graph with edges a[i] - b[i].

    Each round attaches roots to smaller roots and drops the edges inside a component. The number of rounds is
    logarithmic.

    Returns the smallest member of each node's component, [n].
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
