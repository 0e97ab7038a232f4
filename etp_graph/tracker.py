"""Follow unit labels through one forward pass.

Two interception levels are active at once: functions of ``torch.nn.functional`` that own weights are taken by the
layer table (:mod:`etp_graph.layers`), everything below that, operator by operator, by :mod:`etp_graph.operators`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from . import layers
from .forward import Running
from .labels import Labels
from .operators import (
    ALONG,
    ELEMENTWISE,
    JOINS,
    MOVEMENT,
    REDUCTIONS,
    SPATIAL,
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
from .weights import Owner, Ref, Weights


class Tracker:
    """Labels, cost terms and remarks of one or more forward passes of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.labels = Labels()
        self.weights = Weights(model)
        self.ops: list[Op] = []
        self.uncounted: set[str] = set()
        self.bare: dict[str, Tensor] = {}
        self.paused = False
        self._running = Running()
        self._known: Any = WeakTensorKeyDictionary()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Everything that runs inside is followed."""
        with self._running, torch.no_grad(), _Functions(self), _Operators(self):
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
        name = self.weights.bare_name(tensor)
        if name is not None and tensor.numel() > 1:
            if name not in self.bare:
                self.bare[name] = self.labels.fresh(tensor.numel()).view(tensor.shape)
            return self.bare[name]
        label: Tensor | None = self._known.get(tensor)
        return label

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
            return torch.zeros(size, dtype=torch.int64)
        return label.reshape(-1).expand(size)

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
        rule = _rule(func)
        if rule is None or self.tracker.paused:
            return func(*args, **kwargs)
        self.tracker.paused = True
        try:
            out = func(*args, **kwargs)
            rule(self.tracker, func, args, kwargs, out)
        finally:
            self.tracker.paused = False
        return out


def _rule(func: Any) -> Callable[[Tracker, Any, Any, Any, Tensor], None] | None:
    if func in layers.DENSE:
        return _dense
    if func in layers.PASS:
        return _pass
    if func in layers.POOLS:
        return _pool
    return _embedding if func is F.embedding else None


def _dense(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    row = layers.DENSE[func]
    call = layers.bind(row.arguments, args, kwargs)
    x, weight, bias = call["input"], call["weight"], call.get("bias")
    dim = -(row.spatial + 1)
    refs, reason = tracker.weights.find(weight, tracker.modules)
    tracker.weights.use([bias])
    into = tracker.channels(x, dim)
    positions = (x if row.transposed else out).numel() // (x if row.transposed else out).shape[dim]
    kernel = prod(weight.shape[2:])
    if not refs:
        tracker.labels.lock(into, f"enters {func.__name__} in {tracker.where} with {reason}")
        tracker.ops.append(Op(name=tracker.where.strip("'"), coefficient=positions * weight.numel()))
        return
    layer = tracker.weights.layer(refs[0], tracker.modules)
    cost = ((refs[0].name, 0), (refs[0].name, 1))
    tracker.ops.append(Op(name=layer.name, coefficient=positions * kernel, axes=cost))
    groups = call.get("groups", 1)
    made = _grouped(tracker, layer, row, refs, into, out.shape[dim], groups) if groups > 1 else None
    into, made_out, kind = made if made else _full(tracker, layer, row, refs, into)
    tracker.weights.along(tracker.labels, bias, made_out)
    if reason:
        tracker.labels.lock(made_out, reason)
        tracker.labels.lock(into, reason)
    tracker.weights.count(tracker.labels, layer, made_out=made_out, into=into, groups=kind)
    shape = [1] * out.ndim
    shape[dim] = -1
    tracker.set(out, compact(made_out.view(shape)))


def _full(
    tracker: Tracker, layer: Owner, row: layers.Dense, refs: Sequence[Ref], into: Tensor
) -> tuple[Tensor, Tensor, None]:
    """An ordinary layer: fresh units out, any units in."""
    made = tracker.weights.produce(tracker.labels, layer, refs, row.out_axis, row.kind)
    for ref in refs:
        if ref.shape[row.in_axis] > 1 or len(into) == 1:
            tracker.labels.record((ref.name, row.in_axis), into)
    return into, made, None


def _grouped(
    tracker: Tracker, layer: Owner, row: layers.Dense, refs: Sequence[Ref], into: Tensor, n_out: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A grouped convolution: one unit is a whole group, its input and its output channels together.

    A depthwise convolution is the case of one channel a group. Groups may then go in any number, and the
    attribute ``groups`` follows; single positions could only go from every group at once.
    """
    wide = n_out // groups > 1 or len(into) // groups > 1
    kind = "conv-groups" if wide else row.kind
    labels = tracker.weights.produce(tracker.labels, layer, refs, 0, kind).view(groups, -1)
    unit = labels[:, :1]
    why = f"convolution in groups over channels of fixed width in {tracker.where}"
    tracker.labels.unite(labels, unit.expand_as(labels), why)
    tracker.labels.unite(unit.expand(groups, len(into) // groups), into.view(groups, -1), why)
    units = unit.flatten()
    return units.repeat_interleave(len(into) // groups), units.repeat_interleave(n_out // groups), units


def _pass(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    row = layers.PASS[func]
    call = layers.bind(row.arguments, args, kwargs)
    x = call["input"]
    tracker.uncounted.add(func.__name__)
    label = tracker.get(x)
    tracker.weights.use(call.get(name) for name in row.tensors)
    if label is None:
        return
    first = x.ndim - len(call["normalized_shape"]) if row.trailing else 1
    inside = [d for d in varying(label) if d >= first] if row.trailing else [1]
    if x.ndim < 2 or len(inside) > 1 or (not row.trailing and set(varying(label)) - {1}):
        tracker.labels.lock(label, f"lies across the channels that {tracker.where} normalises")
    elif inside and (x.shape[inside[0]] > 1 or not row.trailing):
        ids = tracker.channels(x, inside[0])
        for name in row.tensors:
            tracker.weights.along(tracker.labels, call.get(name), ids, axis=inside[0] - first if row.trailing else 0)
        tracker.weights.count(
            tracker.labels, tracker.weights.running(tracker.modules), into=ids,
            item=inside[0] - x.ndim if row.trailing else None,
        )  # fmt: skip
        if func is F.group_norm and call["num_groups"] > 1:
            tracker.labels.blocks.append((ids, call["num_groups"], tracker.where))
    tracker.set(out, label)


def _pool(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    label = tracker.get(args[0])
    tracker.uncounted.add(func.__name__)
    if label is not None and any(d >= label.ndim - layers.POOLS[func] for d in varying(label)):
        tracker.labels.lock(label, f"is mixed by {func.__name__} in {tracker.where}")
        label = None
    tracker.set(out, label)


def _embedding(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    call = layers.bind(layers.EMBEDDING_ARGUMENTS, args, kwargs)
    refs, _ = tracker.weights.find(call["weight"], tracker.modules)
    tracker.uncounted.add(func.__name__)
    if refs:
        layer = tracker.weights.layer(refs[0], tracker.modules)
        made = tracker.weights.produce(tracker.labels, layer, refs, 1, "features")
        tracker.weights.count(tracker.labels, layer, made_out=made)
        tracker.set(out, made.view([1] * (out.ndim - 1) + [-1]))


class _Operators(TorchDispatchMode):
    """Every operator outside the layer table's functions."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
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
        followed = pointwise or name in MOVEMENT or name in JOINS or name == "constant_pad_nd" or name in REDUCTIONS
        self._price(func, name, args, kwargs, out, followed and not pointwise)
        operands = [Operand(t.shape, self._label(t, followed)) for t in tensors]
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if all(op.label is None for op in operands):
            for t in outs:
                self.tracker.set(t, None)
            return
        try:
            result = self._result(func, name, pointwise, operands, args, kwargs, outs)
        except UnknownOperator:
            self.tracker.lock_all((args, kwargs), f"is mixed by {func} in {self.tracker.where}")
            result = None
        found = result if isinstance(result, (list, tuple)) else [result] * len(outs)
        for t, label in zip(outs, found, strict=False):
            self.tracker.set(t, None if label is None else compact(label))

    def _label(self, tensor: Tensor, followed: bool) -> Tensor | None:
        """Bare parameters get labels only from operators that can carry them."""
        known: Tensor | None = self.tracker._known.get(tensor)
        return self.tracker.get(tensor) if followed else known

    def _price(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, moves: bool) -> None:
        formula = flop_registry.get(func._overloadpacket)
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
        if len([op for op in operands if op.label is not None]) > 1 or first.label is None:
            raise UnknownOperator
        if name in SPATIAL:
            return spatial(tracker.labels, first.label, SPATIAL[name])
        if name in REDUCTIONS:
            return reduction(first.label, name, args, kwargs, outs[0].ndim)
        if name in ALONG:
            return along(first.label, args, kwargs)
        if name in MOVEMENT:
            return movement(tracker.labels, func, name, first, args, kwargs, tracker.where)
        if name == "constant_pad_nd":
            return self._pad(first, args)
        raise UnknownOperator

    def _pad(self, operand: Operand, args: Any) -> Tensor:
        """Zeros beside the units: new units where the running module declares the widths, else fixed positions."""
        label, pads = operand.label, list(args[1])
        assert label is not None
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
            return torch.zeros(max(width, 0), dtype=torch.int64)
        ids = self.tracker.labels.fresh(width)
        self.tracker.labels.count((str(self.tracker.weights.module_name(module)), names[side], None), ids)
        return ids
