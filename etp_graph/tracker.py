"""Follow unit labels through one forward pass.

Two interception levels are active at once: functions of ``torch.nn.functional`` that own weights are taken by the
layer table (:mod:`etp_graph.layers`), everything below that, operator by operator, by :mod:`etp_graph.operators`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from . import layers
from .forward import Running
from .indexing import GATHERS, SCATTERS, gather, met, scatter
from .labels import Labels
from .operators import (
    ALONG,
    ELEMENTWISE,
    JOINS,
    MOVEMENT,
    REDUCTIONS,
    SPATIAL,
    Facet,
    Operand,
    UnknownOperator,
    along,
    compact,
    elementwise,
    join,
    movement,
    reduction,
    spatial,
    varying,
)  # fmt: skip
from .plan import Op
from .products import MATRIX, Product, matrix, placeholder
from .rules import rule, stored_matrix
from .sizes import Counted, Sizes, counting, written
from .weights import Ref, Weights

FOLLOWED = MOVEMENT | JOINS | REDUCTIONS | GATHERS | SCATTERS | {"constant_pad_nd"}
"""Operators through which the labels of bare parameters are followed."""


SUMMED = {
    **dict.fromkeys(("sum", "mean", "nansum"), 0), **dict.fromkeys(("scatter_add", "scatter_add_", "index_add"), 3),
    "index_add_": 3,
}  # fmt: skip
"""Operators that sum, and which of their arguments."""
PACKING = frozenset(("_pack_padded_sequence", "_pad_packed_sequence"))
"""Operators between padded and packed sequences; units along the last dimension stay there."""
VIEWS = frozenset(
    "view unsqueeze squeeze permute transpose t expand select slice split split_with_sizes unbind alias detach".split()
)
"""Operators that make views: those of a bare parameter are labelled when they are used."""
MAKERS = frozenset(("new_zeros", "new_ones", "new_empty", "new_full"))
"""Operators that make a tensor beside another one: of its values nothing is left, of its sizes perhaps some."""


def _made_like(operand: Operand, out: torch.Size) -> Tensor | None:
    """The label of the operand where the new tensor is as long along the units; a wrong guess fails when pruned."""
    label = operand.label
    if label is None or len(out) != label.ndim or any(out[d] != operand.shape[d] for d in varying(label)):
        return None
    return label


def _operand(tensor: Tensor, label: Tensor | None) -> Operand:
    """An expanded dimension is as long as the tensor that it was expanded for: it meets units as one of size 1."""
    if label is not None or tensor.layout != torch.strided or 0 not in tensor.stride():
        return Operand(tensor.shape, label)
    return Operand(torch.Size(1 if st == 0 else s for s, st in zip(tensor.shape, tensor.stride(), strict=True)), None)


class Tracker:
    """Labels, cost terms and remarks of one or more forward passes of a model."""

    def __init__(self, model: nn.Module, facet: Facet = "inner") -> None:
        self.model = model
        self.facet: Facet = facet
        self.labels = Labels()
        self.weights = Weights(model)
        self.ops: list[Op | Product] = []
        self.sizes: Sizes | None = None
        self.uncounted: set[str] = set()
        self.bare: dict[str, Tensor] = {}
        self.paused = False
        self.operands: set[str] = set()
        self.multiplied: Any = WeakTensorKeyDictionary()
        self.deferred: Any = WeakTensorKeyDictionary()
        self.routes: Any = WeakTensorKeyDictionary()
        self._running = Running()
        self._known: Any = WeakTensorKeyDictionary()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Everything that runs inside is followed."""
        with self._running, counting(self.model), torch.no_grad(), _Functions(self), _Operators(self):
            yield

    @property
    def modules(self) -> list[nn.Module]:
        """The stack of running modules, outermost first."""
        return self._running.modules

    @property
    def where(self) -> str:
        """The innermost module that is running, in words."""
        name = self.weights.module_name(self.modules[-1]) if self.modules else None
        return f"{name!r}" if name else "the model's forward"

    def get(self, tensor: Tensor) -> Tensor | None:
        """The compact label of a tensor, or ``None`` if its positions are fixed."""
        if (base := self._bare_base(tensor)) is not None and tensor.numel() > 1:
            name = str(self.weights.bare_name(base))
            if name not in self.bare:
                self.bare[name] = self.labels.table(name, base.shape)
            start = tensor.storage_offset() - base.storage_offset()
            return self.bare[name].as_strided(tensor.shape, tensor.stride(), start)
        if (name := self.weights.embedding_name(tensor)) is not None:
            owner = self.weights.holder(name)
            ref = Ref(name, tuple(tensor.shape))
            return self.weights.produce(self.labels, owner, [ref], 1, "features").view(1, -1)
        if (
            vector := self.weights.vector_name(tensor)
        ) is not None:  # a bias or scale that is not only used by its layer
            if (vector, 0) not in self.labels.axes:
                self.labels.axes[vector, 0] = self.labels.fresh(tensor.numel())
            return self.labels.axes[vector, 0]
        label: Tensor | None = self._known.get(tensor)
        return label

    def _bare_base(self, tensor: Tensor) -> Tensor | None:
        """The bare parameter that a tensor is or is a view of; views are labelled when they are used, not before."""
        if tensor in self._known or tensor.layout != torch.strided:
            return None
        for base in (tensor, self.weights.base(tensor)):
            if base is not None and base.is_contiguous() and self.weights.bare_name(base) is not None:
                return base
        return None

    def set(self, tensor: Tensor, label: Tensor | None) -> None:
        """Label a tensor (compact label, or ``None``)."""
        if label is not None:
            self._known[tensor] = label
        elif tensor in self._known:
            del self._known[tensor]

    def channels(self, tensor: Tensor, dim: int) -> Tensor:
        """The labels [size] of a tensor along one dimension; units along any other dimension are locked."""
        dim %= tensor.ndim
        label = self.get(tensor)
        if label is not None and set(varying(label)) - {dim}:
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
            for dim, size in named if self.facet == "outer" else reversed(named):
                if isinstance(size, Counted) and size.origin:
                    self._count(size, out, dim, x)
        for dim, ends in (sizes.pieces or {}).items():
            label = self.get(x)
            if label is None or label.shape[dim] == 1:
                continue
            ids = self.channels(x, dim)
            if isinstance(out, Tensor) or sizes.parts:
                pieces = {end: ids[:end] for end in ends if isinstance(end, Counted)}.items()
            else:
                pieces = [(size, piece) for size, piece in zip(ends, ids.split(list(ends)), strict=True)]  # type: ignore
            for size, piece in pieces:
                if isinstance(size, Counted) and size.origin:
                    self.labels.count(size.origin, piece)
                elif not isinstance(size, Counted):
                    self.labels.lock(piece, f"is split into pieces of fixed widths in {self.where}")

    def _count(self, size: Counted, out: Tensor, dim: int, x: Any) -> None:
        """An axis that is as long as an attribute says: its units are those that the attribute counts."""
        assert size.origin is not None
        label = self.get(out)
        if label is not None and label.shape[dim] > 1:
            if varying(label) == [dim]:
                self.labels.count(size.origin, label.flatten())
            elif self.labels.loose(label):
                self.labels.guesses.append((size.origin, label, dim))
        elif label is None and (not isinstance(x, Tensor) or x.ndim < out.ndim - dim or x.shape[dim - out.ndim] == 1):
            known = self.labels.attributes.get(size.origin)
            if known is None and out.shape[dim] == size and not isinstance(x, Tensor):
                known = self.labels.fresh(int(size))
                self.labels.count(size.origin, known)
            if known is not None and len(known) == out.shape[dim]:
                self.set(out, compact(known.view([-1 if d == dim else 1 for d in range(out.ndim)])))

    def lock_used_elsewhere(self) -> None:
        """Lock the units of every stored tensor that a layer uses and an operator outside the layer table, too.

        What the operator makes of it has a fixed size. The parts of a weight normalisation are exempt: their layer
        knows how the weight is made of them.
        """
        for (name, _), ids in self.labels.axes.items():
            if name in self.operands and ".parametrizations." not in name:
                self.labels.lock(ids, f"{name} is also used outside its layer")

    def lock_all(self, values: Any, reason: str) -> None:
        """Lock every unit in any tensor among the values."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and self.weights.bare_name(tensor) is None:
                self.labels.lock(self._known.get(tensor), reason)
            elif isinstance(tensor, Tensor):
                name = str(self.weights.bare_name(tensor))
                self.weights.fixed[name] = reason
                self.labels.lock(self.bare.get(name), reason)


class _Functions(TorchFunctionMode):
    """Calls of the layer table's functions."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self.tracker = tracker

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.tracker.paused:
            return func(*args, **kwargs)
        follow = rule(func)
        if follow is None:
            return self._sized(func, args, kwargs)
        self.tracker.paused = True
        try:
            out = func(*args, **kwargs)
            follow(self.tracker, func, args, kwargs, out)
        finally:
            self.tracker.paused = False
        return out

    def _sized(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call of the operators below, which do not see which attributes its sizes are read from."""
        sizes = written(func, args, kwargs)
        if sizes is None:
            return func(*args, **kwargs)
        self.tracker.sizes = sizes
        try:
            out = func(*args, **kwargs)
        finally:
            self.tracker.sizes = None
        self.tracker.count_sizes(args[0] if args else None, sizes, out)
        return out


class _Operators(TorchDispatchMode):
    """Every operator outside the layer table's functions."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracker = tracker

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.tracker.paused:
            self.tracker.paused = True
            try:
                self._follow(func, args, kwargs, out)
            finally:
                self.tracker.paused = False
        return out

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func._overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        pointwise = torch.Tag.pointwise in func.tags or name.rstrip("_") in ELEMENTWISE or name in ELEMENTWISE
        followed = pointwise or name in FOLLOWED
        if name in MATRIX and stored_matrix(self.tracker, name, args, out):
            return None
        if name in VIEWS and self.tracker._bare_base(tensors[0]) is not None:
            return None
        if name not in MOVEMENT:
            weights = self.tracker.weights
            stored = (
                t for t in tensors
                if not (followed and (t in self.tracker._known or weights.embedding_name(t) or weights.vector_name(t)))
            )  # fmt: skip
            self.tracker.operands.update(filter(None, map(self.tracker.weights.stored_name, stored)))
        self._price(func, name, args, kwargs, out, followed and not pointwise)
        self._note_products(name, args, out)
        if name == "select":
            return self._select(args, out)
        for tensor in tensors:
            if tensor in self.tracker.deferred:
                self.tracker.labels.lock(*self.tracker.deferred.pop(tensor))
        operands = [_operand(t, self._label(t, followed)) for t in tensors]
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if all(op.label is None for op in operands):
            if name in MATRIX:
                matrix(self.tracker, name, operands, outs[0].shape)
            for t in outs:
                self.tracker.set(t, None)
            return None
        try:
            result = self._result(func, name, pointwise, operands, args, kwargs, outs)
        except UnknownOperator:
            self.tracker.lock_all((args, kwargs), f"is mixed by {func} in {self.tracker.where}")
            result = None
        found = result if isinstance(result, (list, tuple)) else [result] * len(outs)
        for t, label in zip(outs, found, strict=False):
            self.tracker.set(t, None if label is None else compact(label))

    def _select(self, args: Any, out: Tensor) -> None:
        """One position. Along the units it is a fixed one, if anything but its shape is ever used."""
        x, dim, at = args
        label = self.tracker.get(x)
        self.tracker.set(out, None)
        if label is None:
            return
        dim %= x.ndim
        if varying(label) == [dim]:
            self.tracker.deferred[out] = (label, f"is taken by fixed positions (select) in {self.tracker.where}")
        else:
            self.tracker.set(out, compact(label.select(dim, at if label.shape[dim] > 1 else 0)))

    def _note_products(self, name: str, args: Any, out: Any) -> None:
        """A product of tensors that is summed is as many multiply-adds (messages on edges, scores of a graph)."""
        tracker = self.tracker
        if name in ("mul", "mul_") and all(isinstance(a, Tensor) and a.numel() > 1 for a in args[:2]):
            tracker.multiplied[out] = True
            return
        at = SUMMED.get(name)
        source = args[at] if at is not None and len(args) > at else None
        if isinstance(source, Tensor) and source in tracker.multiplied:
            term, label = placeholder(tracker, tuple(source.shape)), tracker._known.get(source)
            if label is not None:
                tracker.ops[term] = Product(tracker.where.strip("'"), tuple(source.shape), (label,))

    def _label(self, tensor: Tensor, followed: bool) -> Tensor | None:
        """Bare parameters get labels only from operators that can carry them."""
        known: Tensor | None = self.tracker._known.get(tensor)
        return self.tracker.get(tensor) if followed else known

    def _price(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, moves: bool) -> None:
        formula = flop_registry.get(func._overloadpacket)
        if name in MATRIX:
            return  # its factors may shrink: the rule for products notes them
        if formula is not None:
            macs = int(formula(*args, **kwargs, out_val=out)) // 2
            self.tracker.ops.append(Op(name=self.tracker.where.strip("'"), coefficient=macs))
        elif not moves and tree_leaves(args):
            self.tracker.uncounted.add(name.rstrip("_"))

    def _result(
        self, func: Any, name: str, pointwise: bool, operands: Sequence[Operand], args: Any, kwargs: Any, outs: Any
    ) -> Any:
        tracker = self.tracker
        first = operands[0]
        if pointwise:
            return elementwise(tracker.labels, operands, outs[0].shape, tracker.where)
        if name in JOINS:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            return join(tracker.labels, name, operands, dim, tracker.where)
        if name in MAKERS:
            return _made_like(first, outs[0].shape)
        if name in MATRIX:
            return matrix(tracker, name, operands, outs[0].shape)
        if name in SCATTERS:
            return scatter(tracker.labels, name, args, operands, tracker.where)
        if name in GATHERS:
            bare = tracker.weights.bare_name(args[0])
            found = gather(tracker.labels, name, first, args, kwargs, tracker.where, bare)
            return met(tracker.labels, name, found, operands[1:], args, outs[0], tracker.where)
        if len([op for op in operands if op.label is not None]) > 1 or first.label is None:
            raise UnknownOperator
        if name in SPATIAL:
            return spatial(tracker.labels, first.label, SPATIAL[name])
        if name in REDUCTIONS:
            return reduction(tracker.labels, first.label, name, args, kwargs, outs[0].ndim)
        if name in ALONG:
            return along(first.label, args, kwargs)
        if name in MOVEMENT:
            return movement(
                tracker.labels, func, name, first, args, kwargs, tracker.where, tracker.facet, tracker.sizes
            )
        if name == "constant_pad_nd":
            return self._pad(first, args)
        if name in PACKING and varying(first.label) == [first.label.ndim - 1]:
            label = first.label.reshape(-1)
            return [label.view([1] * (t.ndim - 1) + [-1]) if t.is_floating_point() else None for t in outs]
        raise UnknownOperator

    def _pad(self, operand: Operand, args: Any) -> Tensor:
        """Zeros beside the units: new units where the running module declares the widths, else fixed positions."""
        label, pads = operand.label, list(args[1])
        if label is None or min(pads) < 0:
            raise UnknownOperator
        widths = [(pads[2 * i], pads[2 * i + 1]) for i in range(len(pads) // 2)][::-1]
        for dim, (before, after) in enumerate(widths, label.ndim - len(widths)):
            if label.shape[dim] == 1:
                continue
            ends = [self._padding(side, width) for side, width in enumerate((before, after))]
            shape = [-1 if d == dim else 1 for d in range(label.ndim)]
            label = torch.cat([ends[0].view(shape), label, ends[1].view(shape)], dim)
        return label

    def _padding(self, side: int, width: int) -> Tensor:
        module = self.tracker.modules[-1] if self.tracker.modules else None
        names = layers.PADDINGS.get(type(module))  # type: ignore[arg-type]
        if names is None or width <= 0:
            return torch.zeros(max(width, 0), dtype=torch.int64, device="cpu")
        ids = self.tracker.labels.fresh(width)
        self.tracker.labels.count((str(self.tracker.weights.module_name(module)), names[side], None), ids)
        return ids
