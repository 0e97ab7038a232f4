"""Follow unit labels through one forward pass.

Two interception levels are active at once (:mod:`etp_graph.interception`): functions that own weights are taken by the
layer table (:mod:`etp_graph.layers`, :mod:`etp_graph.rules`), everything below that, operator by operator, by
:mod:`etp_graph.operators` and its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from etp_graph.graph.rules._operators import Reading, ReadingsDiffer, compact_label, labelled_dims
from etp_graph.graph.rules._terms import ProductTerm
from etp_graph.model import ModuleStack
from etp_graph.plan import Op

from ._counted_sizes import CountedInt, Sizes
from ._labels import Labels
from ._shape_only import ShapeOnly
from ._weights import StoredTensors, TensorView


class Tracker:
    """Labels, cost terms and remarks of one or more forward passes of a model.

    Attributes:
        facet: which of the axes that a view folds out of a unit axis holds the units; ``None``: no view did so far.
        labels, ops, uncounted: what was found.
        weights: names of the model's tensors and modules.
        bare: labels of the parameters that belong to no layer, by name.
        operands: stored tensors that an operator took whose result has a fixed size.
        sizes: the sizes that the running call writes down.
        multiplied: products of tensors, which are multiply-adds if something sums them.
        deferred: tensors that lock units if anything but their shape is used, with the units and the reason.
        routes: what a router put out, with the labels of its experts.
        readers: modules whose Python code read the value of a tensor, in words.
        modules: the stack of running modules, outermost first.
    """

    def __init__(self, model: nn.Module, modules: list[nn.Module] | None = None) -> None:
        self.model = model
        self.modules = [] if modules is None else modules
        self.reading: Reading | None = None
        self.labels = Labels()
        self.weights = StoredTensors(model)
        self.ops: list[Op | ProductTerm] = []
        self.sizes: Sizes | None = None
        self.uncounted: set[str] = set()
        self.bare: dict[str, Tensor] = {}
        self.readers: dict[str, None] = {}
        self.used_outside_layers: set[str] = set()
        self.multiplied: Any = WeakTensorKeyDictionary()
        self.locks_if_used: Any = WeakTensorKeyDictionary()
        self.routes: Any = WeakTensorKeyDictionary()
        self.label_of: Any = WeakTensorKeyDictionary()

    def split_readings(self) -> None:
        """From here on the facets differ: raises :class:`Fork`, before anything is done, where one tracker is both."""
        if self.reading is None:
            raise ReadingsDiffer

    def split(self) -> Tracker:
        """Become the inner facet; the outer one, which has seen the same so far."""
        outer = copy(self)
        outer.labels, outer.weights = self.labels.copy(), self.weights.copy()
        for name in ("ops", "uncounted", "bare", "used_outside_layers", "readers"):
            setattr(outer, name, copy(getattr(self, name)))
        for name in ("multiplied", "locks_if_used", "routes", "label_of"):
            setattr(outer, name, WeakTensorKeyDictionary(dict(getattr(self, name).items())))
        self.reading, outer.reading = "inner", "outer"
        return outer

    @property
    def where(self) -> str:
        """The innermost module that is running, in words."""
        name = self.weights.module_name(self.modules[-1]) if self.modules else None
        return f"{name!r}" if name else "the model's forward"

    def get(self, tensor: Tensor) -> Tensor | None:
        """The compact label of a tensor, or ``None`` if its positions are fixed."""
        if tensor in self.locks_if_used:
            self.labels.lock(*self.locks_if_used.pop(tensor))
        if (base := self.bare_base(tensor)) is not None and tensor.numel() > 1:
            name = str(self.weights.bare_name(base))
            if name not in self.bare:
                self.bare[name] = self.labels.table(name, base.shape)
            start = tensor.storage_offset() - base.storage_offset()
            return self.bare[name].as_strided(tensor.shape, tensor.stride(), start)
        if (table := self.weights.embedding_name(tensor)) is not None:
            owner = self.weights.holder(table)
            ref = TensorView(table, tuple(tensor.shape))
            return self.weights.produce(self.labels, owner, [ref], 1, "features").view(1, -1)
        if (
            vector := self.weights.vector_name(tensor)
        ) is not None:  # a bias or scale that is not only used by its layer
            if (vector, 0) not in self.labels.axes:
                self.labels.axes[vector, 0] = self.labels.new_labels(tensor.numel())
            return self.labels.axes[vector, 0]
        label: Tensor | None = self.label_of.get(tensor)
        return label

    def bare_base(self, tensor: Tensor) -> Tensor | None:
        """The bare parameter that a tensor is or is a view of; views are labelled when they are used, not before."""
        if tensor in self.label_of or tensor.layout != torch.strided:
            return None
        for base in (tensor, self.weights.base(tensor)):
            if base is not None and base.is_contiguous() and self.weights.bare_name(base) is not None:
                return base
        return None

    def set(self, tensor: Tensor, label: Tensor | None) -> None:
        """Label a tensor (compact label, or ``None``)."""
        if label is not None:
            self.label_of[tensor] = label
        elif tensor in self.label_of:
            del self.label_of[tensor]

    def channels(self, tensor: Tensor, dim: int) -> Tensor:
        """The labels [size] of a tensor along one dimension; units along any other dimension are locked."""
        dim %= tensor.ndim
        label = self.get(tensor)
        for other in set(labelled_dims(label)) - {dim} if label is not None else ():
            if label is not None and self.labels.holds_whole_runs(
                label, other
            ):  # states of several layers meet one weight
                label = self.labels.merge(label, other, self.where)
        if label is not None and set(labelled_dims(label)) - {dim}:
            self.labels.lock(label, f"lies across the channels of {self.where}")
            label = None
        size = tensor.shape[dim]
        if label is None:
            return torch.zeros(size, dtype=torch.int64, device="cpu")
        return label.reshape(-1).expand(size)

    def count_sizes(self, x: Any, sizes: Sizes, out: Any) -> None:
        """Attributes that wrote the sizes of a result, or of the pieces taken from ``x``, count the units there."""
        if isinstance(out, Tensor):
            named = list(enumerate(sizes.named))
            if sum(isinstance(size, CountedInt) for size in sizes.named) > 1:
                self.split_readings()
            for dim, size in named if self.reading == "outer" else reversed(named):
                if isinstance(size, CountedInt) and size.origin:
                    self._count(size, out, dim, x)
        for dim, ends in (sizes.pieces or {}).items():
            label = self.get(x)
            if label is None or label.shape[dim] == 1:
                continue
            ids = self.channels(x, dim)
            if isinstance(out, Tensor) or sizes.parts:
                pieces = {end: ids[:end] for end in ends if isinstance(end, CountedInt)}.items()
            else:
                pieces = [(size, piece) for size, piece in zip(ends, ids.split(list(ends)), strict=True)]  # type: ignore
            for size, piece in pieces:
                if isinstance(size, CountedInt) and size.origin:
                    self.labels.count(size.origin, piece)
                elif not isinstance(size, CountedInt):
                    self.labels.lock(piece, f"is split into pieces of fixed widths in {self.where}")

    def _count(self, size: CountedInt, out: Tensor, dim: int, x: Any) -> None:
        """An axis that is as long as an attribute says: its units are those that the attribute counts."""
        assert size.origin is not None
        label = self.get(out)
        if label is not None and label.shape[dim] > 1:
            if labelled_dims(label) == [dim]:
                self.labels.count(size.origin, label.flatten())
            elif self.labels.is_unbound(label):
                self.labels.guesses.append((size.origin, label, dim))
        elif label is None and (not isinstance(x, Tensor) or x.ndim < out.ndim - dim or x.shape[dim - out.ndim] == 1):
            known = self.labels.attributes.get(size.origin)
            if known is None and out.shape[dim] == size and not isinstance(x, Tensor):
                known = self.labels.new_labels(int(size))
                self.labels.count(size.origin, known)
            if known is not None and len(known) == out.shape[dim]:
                self.set(out, compact_label(known.view([-1 if d == dim else 1 for d in range(out.ndim)])))

    def lock_used_elsewhere(self) -> None:
        """Lock the units of every stored tensor that a layer uses and an operator outside the layer table, too.

        What the operator makes of it has a fixed size. The parts of a weight normalisation are exempt: their layer
        knows how the weight is made of them.
        """
        for (name, _), ids in self.labels.axes.items():
            if name in self.used_outside_layers and ".parametrizations." not in name:
                self.labels.lock(ids, f"{name} is also used outside its layer")

    def lock_all(self, values: Any, reason: str) -> None:
        """Lock every unit in any tensor among the values."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and self.weights.bare_name(tensor) is None:
                self.labels.lock(self.label_of.get(tensor), reason)
            elif isinstance(tensor, Tensor):
                name = str(self.weights.bare_name(tensor))
                self.weights.fixed[name] = reason
                self.labels.lock(self.bare.get(name), reason)


class Trackers:
    """One forward, followed by a tracker, and from the first call on that the facets follow differently by two.

    Args:
        model: the model.
        compute: whether all of the forward is computed, see :mod:`etp_graph.hollow`.

    Attributes:
        all: the tracker, or those of the inner and the outer facet.
        hollow: what was not computed.
        paused: nothing is followed now.
    """

    def __init__(self, model: nn.Module, *, compute: bool = True) -> None:
        self.running = ModuleStack()
        self.all = [Tracker(model, self.running.modules)]
        self.shape_only = ShapeOnly(active=not compute)
        self.paused = False

    def each(self, follow: Callable[[Tracker], None]) -> None:
        """Let every tracker follow a call."""
        try:
            for tracker in self.all:
                follow(tracker)
        except ReadingsDiffer:
            self.all.append(self.all[0].split())
            self.each(follow)
