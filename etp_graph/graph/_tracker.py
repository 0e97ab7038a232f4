"""Follow unit labels through one forward pass.

Two levels of interception are active at once (:mod:`etp_graph.graph._interception`). The layer table
(:mod:`etp_graph.model`, :mod:`etp_graph.graph.rules`) handles functions that own weights.
:mod:`etp_graph.graph.rules._dispatch` and the modules that it imports handle all other operators, one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from etp_graph.graph.rules._operators import (
    ReadingsDiffer,
    UnknownOperator,
    compact_label,
    labelled_dims,
)
from etp_graph.graph.rules._terms import ProductTerm
from etp_graph.model import running_line
from etp_graph.plan import Op, add_line, name_norm

from ._counted_sizes import CountedInt, Sizes, is_counted, read_size
from ._labels import REPEATED, Labels, Reading, at_running_line
from ._traced_numbers import Numbers, Origin, ReadSize, Source, current_numbers
from ._view_sizes import ViewSizes, keep_widths_apart
from ._weights import StoredTensors, TensorView


class Tracker:
    """Labels, cost terms and notes of one or more forward passes of a model.

    Attributes:
        labels: labels of the units.
        ops: cost terms.
        uncounted: names of the operators that ran and are not in the cost.
        n_norms: number of calls of norms that have no weights.
        weights: names of the model's tensors and modules.
        bare: labels of the parameters that belong to no layer, by name.
        operands: names of stored tensors that an operator used whose result has a fixed size.
        sizes: sizes written in the running call.
        multiplied: elementwise products of tensors. If such a tensor is summed, it counts as multiply-adds.
        deferred: tensors with units and a reason. The units are locked if anything but the tensor's shape is used.
        gathered: tensors that hold matrices of a stored stack, chosen by an index, each with its view of the stack.
        routes: outputs of a router, with the labels of its experts.
        known: compact labels of activations.
        view_sizes: sizes of views and of new tensors that the code computes.
        cached: bytes of each tensor of the cache that the model returns, for one token of one sample.
        readers: modules whose Python code read the value of a tensor, for messages.
        modules: the stack of running modules, outermost first.
    """

    def __init__(self, model: nn.Module, modules: list[nn.Module] | None = None) -> None:
        self.model = model
        self.modules = [] if modules is None else modules
        self.labels = Labels()
        self.weights = StoredTensors(model)
        self.ops: list[Op | ProductTerm] = []
        self.sizes: Sizes | None = None
        self.uncounted: set[str] = set()
        self.n_norms = 0
        self.bare: dict[str, Tensor] = {}
        self.readers: dict[str, None] = {}
        self.used_outside_layers: dict[str, str | None] = {}
        self.multiplied: Any = WeakTensorKeyDictionary()
        self.locks_if_used: Any = WeakTensorKeyDictionary()
        self.gathered: Any = WeakTensorKeyDictionary()
        self.routes: Any = WeakTensorKeyDictionary()
        self.label_of: Any = WeakTensorKeyDictionary()
        self.view_sizes = ViewSizes()
        self.cached: list[Op | ProductTerm] = []

    @property
    def reading(self) -> Reading | None:
        """The reading: which of the axes that a view folds out of a unit axis holds the units.

        ``None`` until a call depends on it.
        """
        return self.labels.reading

    def split_readings(self) -> None:
        """Require a reading. Call this before the tracker is changed.

        Raises:
            Fork: the tracker has no reading yet. :class:`Trackers` then splits it and follows the call again.
        """
        if self.reading is None:
            raise ReadingsDiffer

    def split(self) -> Tracker:
        """Take one of the readings that differ, and return a copy of this tracker that takes the other one.

        The inner reading is split from the outer one, and later the outer one from that of the copies of heads.
        """
        outer = copy(self)
        outer.labels, outer.weights = self.labels.copy(), self.weights.copy()
        outer.view_sizes = self.view_sizes.copy()
        for name in ("ops", "uncounted", "bare", "used_outside_layers", "readers"):
            setattr(outer, name, copy(getattr(self, name)))
        for name in ("multiplied", "locks_if_used", "gathered", "routes", "label_of"):
            setattr(outer, name, WeakTensorKeyDictionary(dict(getattr(self, name).items())))
        if self.reading is None:
            self.labels.reading, outer.labels.reading = "inner", "outer"
        else:
            self.labels.by_copy, outer.labels.by_copy = False, True
        return outer

    def follows_copies(self, originals: Tensor | None, n_originals: int) -> bool:
        """Return True if the units along an axis of heads that are repeated are the copies. Call it before a change.

        Args:
            originals: labels of the heads along their axis; ``None`` if they are no units.
            n_originals: number of the heads. If there is one, its copies are all heads of the queries.

        Raises:
            ReadingsDiffer: the heads are units, and the tracker has not chosen between them and their copies.
        """
        if self.reading != "outer" or originals is None:
            return self.reading == "outer" and n_originals == 1
        if self.labels.by_copy is None:
            raise ReadingsDiffer
        return self.labels.by_copy

    def new_copies(self, times: int, attribute: Origin | None, originals: Tensor | None) -> Tensor:
        """Return labels [times] of the copies of heads; those that the attribute counts already, if there are any."""
        known = None if attribute is None else self.labels.attributes.get(attribute)
        made = self.labels.new_labels(times) if known is None or len(known) != times else known
        if attribute is not None:
            self.labels.count(attribute, made)
        if originals is not None:
            self.labels.copies.append(made)
            self.labels.originals.append(originals[originals > 0])
            self.labels.lock(originals, f"{REPEATED} in {self.where}")
        return made

    def _label_copies(self, x: Tensor, sizes: Sizes, out: Tensor) -> None:
        """Label the copies of heads that ``expand``, ``repeat`` or ``repeat_interleave`` makes.

        An attribute gives their number, or several give it.
        """
        dim, times, heads = _copied_heads(x, sizes, out)
        if times is None:
            return
        label = self.get(x)
        held = None if label is None or label.shape[heads] == 1 else label
        if not self.follows_copies(held, x.shape[heads]):
            return
        if held is None:
            self.labels.lock(label, f"{REPEATED} in {self.where}")
        made = self.new_copies(int(times), times.origin, None if held is None else held.flatten())
        if sizes.copies is not None:
            made = made.repeat_interleave(x.shape[heads]) if sizes.tiled else made.repeat(x.shape[heads])
        self.set(out, compact_label(made.view([-1 if d == dim else 1 for d in range(out.ndim)])))

    @property
    def where(self) -> str:
        """The innermost running module, for messages."""
        name = self.weights.module_name(self.modules[-1]) if self.modules else None
        return f"{name!r}" if name else "the model's forward"

    def get(self, tensor: Tensor) -> Tensor | None:
        """Return the compact label of a tensor, or ``None`` if all its positions are fixed."""
        if tensor in self.locks_if_used:
            self.labels.lock(*self.locks_if_used.pop(tensor))
        if (base := self.bare_base(tensor)) is not None and tensor.numel() > 1:
            name = str(self.weights.bare_name(base))
            if name not in self.bare:
                self.bare[name] = self.labels.label_entries(name, base.shape)
            start = tensor.storage_offset() - base.storage_offset()
            return self.bare[name].as_strided(tensor.shape, tensor.stride(), start)
        if (table := self.weights.embedding_name(tensor)) is not None:
            owner = self.weights.layer_of(table)
            ref = TensorView(table, tuple(tensor.shape))
            return self.weights.produce(self.labels, owner, [ref], 1, "features").view(1, -1)
        if (
            vector := self.weights.vector_name(tensor)
        ) is not None:  # a bias or scale that is also used outside its layer
            if (vector, 0) not in self.labels.axes:
                self.labels.axes[vector, 0] = self.labels.new_labels(tensor.numel())
            return self.labels.axes[vector, 0]
        label: Tensor | None = self.label_of.get(tensor)
        return label

    def bare_base(self, tensor: Tensor) -> Tensor | None:
        """Return the bare parameter that a tensor is or is a view of. Such a view gets its labels when it is used."""
        if tensor in self.label_of or tensor.layout != torch.strided:
            return None
        for base in (tensor, self.weights.base_of(tensor)):
            if base is not None and base.is_contiguous() and self.weights.bare_name(base) is not None:
                return base
        return None

    def set(self, tensor: Tensor, label: Tensor | None) -> None:
        """Set the compact label of a tensor. ``None`` removes it."""
        if label is not None:
            self.label_of[tensor] = label
        elif tensor in self.label_of:
            del self.label_of[tensor]

    def channels(self, tensor: Tensor, dim: int) -> Tensor:
        """Return the labels [size] of a tensor along one dimension. Lock units along any other dimension."""
        dim %= tensor.ndim
        label = self.get(tensor)
        for other in set(labelled_dims(label)) - {dim} if label is not None else ():
            if label is not None and self.labels.holds_whole_runs(
                label, other
            ):  # one weight takes states of several layers
                label = self.labels.merge_dim(label, other, self.where)
        if label is not None and set(labelled_dims(label)) - {dim}:
            self.labels.lock(label, f"lies across the channels of {self.where}")
            label = None
        size = tensor.shape[dim]
        if label is None:
            return torch.zeros(size, dtype=torch.int64, device="cpu")
        return label.reshape(-1).expand(size)

    def count_sizes(self, x: Any, sizes: Sizes, out: Any) -> None:
        """Record that the attributes that gave the sizes of ``out``, or of pieces of ``x``, count the units there.

        Lock the units of pieces whose size is a plain number.
        """
        if isinstance(out, Tensor):
            if isinstance(x, Tensor):
                self._label_copies(x, sizes, out)
            named = list(enumerate(sizes.named))
            if sum(is_counted(size) for size in sizes.named) > 1:
                self.split_readings()
            read = {} if isinstance(x, Tensor) else {dim: read_size(size) for dim, size in named}
            for dim, number in read.items():  # first of all: another size may be that of a kernel
                if number is not None:
                    self._make_like(out, dim, number)
            for dim, size in named if self.reading == "outer" else reversed(named):
                if is_counted(size) and size.origin:
                    self._count(size, out, dim, x)
                elif not isinstance(x, Tensor) and read[dim] is None:
                    reason = f"gives the size of a new tensor in {self.where}"
                    self.view_sizes.note(size, out.shape, dim, self.label_of.get(out), reason)
                if isinstance(x, Tensor) and x.numel() == out.numel():
                    reason = f"their number gives the size of other units in {self.where}"
                    self.view_sizes.note(size, out.shape, dim, self.label_of.get(out), reason)
        for dim, ends in (sizes.pieces or {}).items():
            self._count_pieces(x, dim, ends, sliced=isinstance(out, Tensor), parts=sizes.parts)

    def _count_pieces(self, x: Tensor, dim: int, ends: Sequence[Any], *, sliced: bool, parts: bool) -> None:
        """Record what the sizes of the pieces of ``x`` along a dimension say about its units."""
        label = self.get(x)
        if label is not None and len(labelled_dims(label)) > 1 and self.labels.is_unbound(label):
            self.labels.pin_axes(label, dim, f"is split into pieces of fixed widths in {self.where}")
        elif label is not None and label.shape[dim] > 1:
            ids = self.channels(x, dim)
            if sliced or parts:
                pieces = [(end, ids[:end] if end >= 0 else ids[end:]) for end in ends if is_counted(end)]
            else:
                pieces = [(size, piece) for size, piece in zip(ends, ids.split(list(ends)), strict=True)]
            for size, piece in pieces:
                if is_counted(size) and size.origin:
                    self.labels.count(size.origin, piece)
                elif is_counted(size) and sliced and size.whole is not None:
                    self._tie_parts(ids, size)
                elif is_counted(size):
                    reason = f"their number gives the size of other units in {self.where}"
                    self.view_sizes.note(size, piece.shape, 0, piece if bool(piece.any()) else None, reason)
                elif not self.labels.holds_whole_runs(label, dim):
                    self.labels.lock(piece, f"is split into pieces of fixed widths in {self.where}")

    def _make_like(self, out: Tensor, dim: int, number: int) -> None:
        """Label a new tensor along the dimension whose size is that of another activation along its units."""
        numbers = current_numbers()
        found = None if numbers is None else numbers.sizes[number]
        label = None if found is None else self._label_of_size(found)
        reason = f"gives the size of a new tensor in {self.where}"
        if label is not None and len(labelled_dims(label)) > 1 and self.labels.is_unbound(label):
            self.view_sizes.note_unlabelled(number, reason)  # a parameter that meets units later, if at all
        elif found is None or label is None or len(labelled_dims(label)) > 1:
            self.labels.lock(label, reason)
        elif (known := self.label_of.get(out)) is None:
            self.set(out, compact_label(label.reshape([-1 if d == dim else 1 for d in range(out.ndim)])))
        elif labelled_dims(known) != [dim]:
            self.labels.lock(label, reason)

    def _tie_parts(self, ids: Tensor, part: CountedInt) -> None:
        """Unite the units of the equal parts of an axis, one of which is sliced (``x[:, : x.shape[1] // 2]``)."""
        if part.whole is None or int(part.whole) != len(ids):
            self.labels.lock(ids, f"is split into pieces of fixed widths in {self.where}")
            return
        parts = ids.view(-1, int(part))
        self.labels.unite(parts, parts[:1].expand_as(parts), f"meets channels of fixed width in {self.where}")

    def _count(self, size: CountedInt, out: Tensor, dim: int, x: Any) -> None:
        """Record that the attribute that gave the size of a dimension of ``out`` counts the units along it.

        If ``out`` has no units yet, label the dimension with the units that the attribute counts.
        """
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

    def note_norm(self, ids: Tensor | None) -> None:
        """Record the units of a norm without weights, by its number, so that the masked model finds them again."""
        self.n_norms += 1
        if ids is not None:
            self.labels.count(name_norm(self.n_norms), ids)

    def lock_used_numbers(self, numbers: Numbers) -> None:
        """Lock the units whose number the code uses as a value, and count those that it compares with an attribute."""
        for attribute, number in numbers.compared:
            found = numbers.sizes[number]
            label = self._label_of_size(found)
            if label is not None and labelled_dims(label) == [found.dim] and self.weights.may_count(attribute):
                self.labels.count(attribute, label.flatten())
        for (source, line), times in numbers.values.items():
            if times > 0 and isinstance(source, int):
                found = numbers.sizes[source]
                reason = f"their number is used as a value, such as a scale, in {found.where}"
                self.labels.lock(self._label_of_size(found), add_line(reason, line))
            elif times > 0 and not isinstance(source, int):
                module, name, _ = source
                path = f"{module}.{name}" if module else name
                reason = f"their number ({path}) is used as a value, such as a scale"
                self.labels.lock(self.labels.attributes.get(source), add_line(reason, line))
        self.view_sizes.lock_other_units(self.labels, lambda number: self._label_of_size(numbers.sizes[number]))
        self.view_sizes.count_products(self.labels)
        for number, line in numbers.fixed.items():
            found = numbers.sizes[number]
            reason = f"their number is compared with a fixed one in {found.where}"
            self.labels.lock(self._label_of_size(found), add_line(reason, line))

    def keep_widths_apart(self, numbers: Numbers) -> list[str]:
        """Let the larger one of two widths that the code compares stay the larger one, and return the lines."""
        return keep_widths_apart(self.labels, numbers, lambda source: self._label_of_source(source, numbers))

    def _label_of_source(self, source: Source, numbers: Numbers) -> Tensor | None:
        if isinstance(source, int):
            return self._label_of_size(numbers.sizes[source])
        return self.labels.attributes.get(source)

    def _label_of_size(self, found: ReadSize) -> Tensor | None:
        label = found.labels[min(self._number, len(found.labels) - 1)]
        if label is not None and len(labelled_dims(label)) > 1 and self.labels.is_unbound(label):
            label = compact_label(self.labels.roots()[label])  # units lie along one axis of a parameter
        if label is None or label.shape[found.dim] == 1 or self.labels.holds_whole_runs(label, found.dim):
            return None
        if self.labels.originals and bool(torch.isin(label[label > 0], torch.cat(self.labels.originals)).all()):
            return None  # they stay in this reading
        return label

    @property
    def _number(self) -> int:
        """The place of this tracker among those of its model."""
        return 0 if self.reading != "outer" else 2 if self.labels.by_copy else 1

    def lock_used_elsewhere(self) -> None:
        """Lock the units of every stored tensor that both a layer and an operator outside the layer table use.

        The result of that operator has a fixed size. The parts of a weight normalisation are exempt, because the rule
        of the layer takes into account how the weight is computed from them.
        """
        for (name, _), ids in self.labels.axes.items():
            if name in self.used_outside_layers and ".parametrizations." not in name:
                line = self.used_outside_layers[name]
                self.labels.lock(ids, add_line(f"{name} is also used outside its layer", line))

    def note_used_outside(self, name: str) -> None:
        """Note that an operator outside the layer table uses a stored tensor, and the first line that does."""
        if name not in self.used_outside_layers:
            self.used_outside_layers[name] = running_line()

    def note_output(self, entry: str, tensor: Tensor) -> None:
        """Note the units that an entry of the model's output shows."""
        label = self.label_of.get(tensor)
        if label is not None:
            self.labels.shown.append((entry, label))

    def cache_term(self, number: int, tensor: Tensor) -> ProductTerm:
        """Return the bytes that cached keys or values [batch, heads, tokens, size] take for one token of one sample."""
        label = self.label_of.get(tensor)
        apart = label is not None and label.shape[0] == label.shape[2] == 1
        shape = (tensor.element_size(), tensor.shape[1], 1, tensor.shape[3])
        return ProductTerm(f"cache {number}", shape, (label,) if apart else ())

    def lock_all(self, values: Any, reason: str) -> None:
        """Lock every unit in any tensor among the values. Mark bare parameters among them as fixed."""
        reason = at_running_line(reason)
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and self.weights.bare_name(tensor) is None:
                self.labels.lock(self.label_of.get(tensor), reason)
            elif isinstance(tensor, Tensor):
                name = str(self.weights.bare_name(tensor))
                self.weights.fixed[name] = reason
                self.labels.lock(self.bare.get(name), reason)

    def lock_unfollowed(self, func: Any, values: Any, error: Exception) -> None:
        """Lock the units of a call that a rule could not follow, and those of the stored tensors that it used."""
        cause = "is mixed" if isinstance(error, UnknownOperator) else "could not be followed"
        detail = "" if isinstance(error, UnknownOperator) else f" ({type(error).__name__}: {error})".replace(": )", ")")
        name = func if isinstance(func, torch._ops.OpOverload) else getattr(func, "__name__", func)
        reason = f"{cause} by {name} in {self.where}{detail}"
        self.lock_all(values, reason)
        for tensor in tree_leaves(values):
            if not isinstance(tensor, Tensor):
                continue
            self.labels.lock(self.locks_if_used.pop(tensor, (None, ""))[0], reason)
            if (base := self.bare_base(tensor)) is not None and base is not tensor:
                self.lock_all([base], reason)
            if (stored := self.weights.stored_name(tensor)) is not None:
                self.note_used_outside(stored)
            self.set(tensor, None)


def _copied_heads(x: Tensor, sizes: Sizes, out: Tensor) -> tuple[int, CountedInt | None, int]:
    """Return the dimension of ``out`` that holds copies of heads, their number, and the dimension of heads in ``x``.

    The number is ``None`` if the call makes no such copies. ``expand`` makes them along a dimension behind the heads,
    or along the one before them, which follows the batch.
    """
    if sizes.copies is not None:
        return sizes.copies[0], sizes.copies[1], sizes.copies[0]
    for dim, size in enumerate(sizes.named) if x.ndim == out.ndim else ():
        if dim > 0 and is_counted(size) and x.shape[dim] == 1 < out.shape[dim] == size and x.ndim > 3:
            return dim, size, dim - 1 if dim > 1 else dim + 1
    return 0, None, 0
