"""Interception of a forward: functions that own weights or write sizes, and all operators below them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from etp_graph.graph.rules._dispatch import FOLLOWED, Call, given_arguments, label_of_result
from etp_graph.graph.rules._layer_rules import follow_deformable, note_gathered, rule_of_layer, stored_matrix
from etp_graph.graph.rules._operators import (
    ELEMENTWISE,
    MOVEMENT,
    Operand,
    UnknownOperator,
    compact_label,
    labelled_dims,
)
from etp_graph.graph.rules._products import (
    MATRIX,
    add_empty_term,
    label_of_matrix_product,
    rule_of_shared_matrix,
)
from etp_graph.graph.rules._recurrent import makes_state
from etp_graph.graph.rules._terms import ProductTerm
from etp_graph.model import ChosenOutputs, eval_mode, run_outputs
from etp_graph.plan import Op

from ._counted_sizes import NEW, is_counted, written_sizes
from ._labels import at_running_line
from ._traced_numbers import ReadSize, TracedInt, current_numbers, note_operands
from ._tracker import Tracker
from ._trackers import Trackers

SUMMED = {
    **dict.fromkeys(("sum", "mean", "nansum"), 0),
    **dict.fromkeys(("scatter_add", "scatter_add_", "index_add", "index_add_"), 3),
}
"""Operators that sum -> position of the argument that they sum."""

VIEWS = frozenset(
    "view unsqueeze squeeze permute transpose t expand select slice split split_with_sizes unbind alias detach".split()
)
"""Operators that make views. A view of a bare parameter gets its labels when it is used."""

SAME_VALUES = frozenset("view _unsafe_view expand alias detach clone".split())
"""Operators whose result has the values of their operand in the same order."""

STACKS = frozenset(("index", "index_select"))
"""Operators that may choose matrices of a stored stack."""

LEAVING = frozenset("numpy __array__ tolist data_ptr __dlpack__".split())
"""Methods that pass values out of PyTorch, where calls cannot be intercepted."""


_COUNTS = (Tensor.numel, Tensor.nelement)

_READS_SIZE = frozenset((Tensor.size, Tensor.shape.__get__, *_COUNTS))  # type: ignore[attr-defined]
"""Functions that give sizes of a tensor to Python code."""


class Functions(TorchFunctionMode):
    """Function mode for calls of the layer table's functions, and of functions that write sizes."""

    def __init__(self, trackers: Trackers) -> None:
        super().__init__()
        self.trackers = trackers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.trackers.paused:
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") in LEAVING:
            self.trackers.shape_only.require_value(func.__name__, args[0])
            for tracker in self.trackers.all:
                tracker.lock_all(args[:1], f"leaves PyTorch by {func.__name__}() in {tracker.where}")
        if func in _READS_SIZE:
            return self._measured(func, args, kwargs)
        note_operands(getattr(func, "__name__", ""), args)
        follow = self._rule_of_shared_matrix(func, args, kwargs) or rule_of_layer(func)
        if follow is None or (func is torch.zeros and not makes_state(self.trackers.all[0])):
            return self._sized(func, args, kwargs)
        self.trackers.paused = True
        try:
            out = self.trackers.shape_only.call(func, args, kwargs)
            with torch._C._DisableTorchDispatch():  # operators on labels are not intercepted
                self.trackers.each(lambda t: follow(t, func, args, kwargs, out), func, (args, kwargs, out))
        finally:
            self.trackers.paused = False
        return out

    def _rule_of_shared_matrix(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the rule of a product of activations that uses one matrix for several, or ``None``."""
        rule = rule_of_shared_matrix(func, args, kwargs)
        stored = self.trackers.all[0].weights.stored_name  # stored matrices have a rule of their own
        return None if rule and any(isinstance(x, Tensor) and stored(x) is not None for x in args) else rule

    def _measured(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the shape or a size of a tensor, in which sizes along units are numbers that know it."""
        out, numbers = func(*args, **kwargs), current_numbers()
        labels = tuple(tracker.label_of.get(args[0]) for tracker in self.trackers.all)
        dims = {d for label in labels if label is not None for d in labelled_dims(label)}
        if numbers is None or not dims or self._runs_torch():
            return out
        where = self.trackers.all[0].where
        if isinstance(out, torch.Size):
            reads = (numbers.read(n, ReadSize(labels, d, where)) if d in dims else n for d, n in enumerate(out))
            return torch.Size(reads)
        if func in _COUNTS:
            sources = [numbers.read(out, ReadSize(labels, d, where)).sources for d in dims]
            return TracedInt(out, frozenset().union(*sources))
        dim = (args[1] if len(args) > 1 else kwargs["dim"]) % args[0].ndim
        return numbers.read(out, ReadSize(labels, dim, where)) if dim in dims else out

    def _runs_torch(self) -> bool:
        """Return True in the code of a module of PyTorch, which checks sizes against its own attributes."""
        modules = self.trackers.running.modules
        return bool(modules) and type(modules[-1]).__module__.startswith("torch.nn")

    def _sized(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Make a call and note the attributes that its sizes are read from, which its operators do not show."""
        try:
            sizes = written_sizes(func, args, kwargs)
        except Exception as error:  # noqa: BLE001 - sizes in a form that nobody foresaw; they lock
            return self._unsized(func, args, kwargs, error)
        if sizes is None:
            return func(*args, **kwargs)
        for tracker in self.trackers.all:
            tracker.sizes = sizes
        try:
            out = func(*args, **kwargs)
        finally:
            for tracker in self.trackers.all:
                tracker.sizes = None
        with torch._C._DisableTorchDispatch():
            x = args[0] if args and getattr(func, "__name__", "") not in NEW else None
            self.trackers.each(lambda tracker: tracker.count_sizes(x, sizes, out), func, (args, kwargs, out))
        return out

    def _unsized(self, func: Any, args: Any, kwargs: Any, error: Exception) -> Any:
        """Make a call whose sizes could not be read. Lock its units if the call itself is valid."""
        out = func(*args, **kwargs)
        for tracker in self.trackers.all:
            tracker.lock_unfollowed(func, (args, kwargs, out), error)
        return out


class Operators(TorchDispatchMode):
    """Dispatch mode for every operator outside the layer table's functions."""

    def __init__(self, trackers: Trackers) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trackers = trackers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_in((args, kwargs))
        if self.trackers.state is not None:
            self.trackers.state.save_before_write(func, args, kwargs)
        out = self.trackers.shape_only.run(func, args, kwargs, tensors, self.trackers.random.call)
        if not self.trackers.paused:
            self.trackers.paused = True
            try:
                seen = Operation.of(func, args, kwargs, out, tensors)
                self.trackers.shape_only.follow(seen.name, seen.tensors, seen.outs)
                self.trackers.each(lambda t: OperationFollower(t, seen).follow(), func, (args, kwargs, out))
            finally:
                self.trackers.paused = False
        return out


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of an operator, shared by all trackers."""

    func: Any
    name: str
    args: Any
    kwargs: Any
    out: Any
    tensors: list[Tensor]
    outs: list[Tensor]
    pointwise: bool
    followed: bool

    @property
    def given(self) -> dict[str, Any]:
        """The arguments by name, with the defaults of the operator."""
        return given_arguments(self.func, self.args, self.kwargs)

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any, out: Any, tensors: list[Tensor]) -> Operation:
        """Make the description of a call and its result."""
        name = func._overloadpacket.__name__
        pointwise = torch.Tag.pointwise in func.tags or name.rstrip("_") in ELEMENTWISE or name in ELEMENTWISE
        followed = pointwise or name in FOLLOWED
        return cls(func, name, args, kwargs, out, tensors, tensors_in(out), pointwise, followed)


@dataclass(frozen=True, slots=True)
class OperationFollower:
    """One operator call, followed by one tracker."""

    tracker: Tracker
    seen: Operation

    def follow(self) -> None:
        """Note the cost of the operator and label its outputs."""
        tracker, seen = self.tracker, self.seen
        if seen.name == "_local_scalar_dense":
            tracker.readers.setdefault(tracker.where)
        if seen.name in MATRIX and stored_matrix(tracker, seen.name, seen.args, seen.out):
            return
        if seen.name == "deform_conv2d" and follow_deformable(tracker, seen.args, seen.out):
            return
        if seen.name in VIEWS and tracker.bare_base(seen.tensors[0]) is not None:
            self._pin_fixed_ends()
            return
        if seen.name == "view_as_complex":
            self._keep_rows_even()
        self._note_gathered()
        if seen.name in STACKS:
            note_gathered(tracker, seen.name, seen.args, seen.outs[0])
        self._note_stored()
        self._price()
        self._note_products()
        if seen.name == "select":
            self._select()
            return
        for tensor in seen.tensors:
            if tensor in tracker.locks_if_used:
                tracker.labels.lock(*tracker.locks_if_used.pop(tensor))
        # Bare parameters get labels only if the operator can pass them on.
        look = tracker.get if seen.followed else tracker.label_of.get
        operands = [_operand(t, look(t)) for t in seen.tensors]
        call = Call(tracker, seen.func, seen.name, seen.args, seen.kwargs, operands, seen.outs, seen.pointwise)
        for tensor, label in zip(seen.outs, self._labels(call), strict=False):
            known = label is None or any(label is operand.label for operand in operands)  # compact already
            found = label if known else compact_label(label)  # type: ignore[arg-type]
            if found is not None and not _fits(found, tensor):
                raise LabelDoesNotFit(f"label {list(found.shape)} for a result {list(tensor.shape)}")
            tracker.set(tensor, found)

    def _keep_rows_even(self) -> None:
        """Keep even the width of a tensor of which a part becomes complex numbers: PyTorch requires even strides."""
        base, labels = self.seen.tensors[0]._base, self.tracker.labels
        label = None if base is None else self.tracker.get(base)
        if label is not None:
            for dim in labelled_dims(label):
                labels.multiples.append((label.movedim(dim, 0).flatten(1)[:, 0], 2))

    def _note_gathered(self) -> None:
        """Pass on what a tensor of matrices chosen by an index is, if the call leaves its shape. Else note its use."""
        gathered = self.tracker.gathered
        for tensor in self.seen.tensors:
            if tensor not in gathered:
                continue
            if self.seen.name in SAME_VALUES and self.seen.outs[0].shape == tensor.shape:
                gathered[self.seen.outs[0]] = gathered[tensor]
            else:
                self.tracker.note_used_outside(gathered[tensor].name)

    def _pin_fixed_ends(self) -> None:
        """Pin the axis of a bare parameter that is cut at a plain number: the code would cut a shorter axis there, too.

        A slice that only leaves out its first positions is right, because these hold no units.
        """
        tracker, seen = self.tracker, self.seen
        x, given, sizes = seen.tensors[0], seen.given, tracker.sizes
        if seen.name not in ("slice", "split", "split_with_sizes") or x.shape == seen.outs[0].shape:
            return
        dim = given["dim"] % x.ndim
        if seen.name == "slice":
            start, end, step = given["start"] or 0, given["end"], given["step"]
            cut = start < 0 or step != 1 or (end is not None and 0 <= end < x.shape[dim])
            fixed = cut and (sizes is None or dim not in sizes.follow)
        else:
            held = None if sizes is None or sizes.pieces is None else sizes.pieces.get(dim)
            fixed = not any(map(is_counted, held)) if held is not None else seen.name == "split_with_sizes"
        ref = tracker.weights.view_of(x) if fixed else None
        if ref is not None:
            reason = at_running_line(f"is taken by fixed positions in {tracker.where}")
            tracker.labels.pinned.setdefault(ref.axis(dim), reason)

    def _labels(self, call: Call) -> list[Tensor | None]:
        """Return the label of every output of the call."""
        if all(operand.label is None for operand in call.operands):
            if call.name in MATRIX:
                label_of_matrix_product(self.tracker, call.name, call.operands, call.outs[0].shape)
            return [None] * len(call.outs)
        try:
            found = label_of_result(call)
        except UnknownOperator:
            self.tracker.lock_all((call.args, call.kwargs), f"is mixed by {call.func} in {self.tracker.where}")
            found = None
        return list(found) if isinstance(found, (list, tuple)) else [found] * len(call.outs)

    def _note_stored(self) -> None:
        """Note stored tensors whose labels are not passed on to the result."""
        weights = self.tracker.weights
        if self.seen.name in MOVEMENT or self._scales_in_place():
            return
        for t in self.seen.tensors:
            if self.seen.followed and (
                t in self.tracker.label_of or weights.embedding_name(t) or weights.vector_name(t)
            ):
                continue
            if self.seen.outs and self.seen.outs[0] in self.tracker.gathered:
                continue
            stored = weights.stored_name(t)
            if stored is not None:
                self.tracker.note_used_outside(stored)

    def _scales_in_place(self) -> bool:
        """Return True for a stored tensor that is scaled in place by numbers, as RWKV does before its first forward."""
        tensors, outs = self.seen.tensors, self.seen.outs
        return self.seen.pointwise and len(tensors) == len(outs) == 1 and outs[0] is tensors[0]

    def _select(self) -> None:
        """Label the result of a ``select``.

        If it takes one of the units, they are locked as soon as more than the shape of the result is used.
        """
        tracker, out = self.tracker, self.seen.out
        x, dim, at = self.seen.args
        label = tracker.get(x)
        tracker.set(out, None)
        if label is None:
            return
        dim %= x.ndim
        if label.shape[dim] > 1 and not tracker.labels.holds_whole_runs(label, dim):
            reason = at_running_line(f"is taken by fixed positions (select) in {tracker.where}")
            tracker.locks_if_used[out] = (label, reason)
        else:
            tracker.set(out, compact_label(label.select(dim, at if label.shape[dim] > 1 else 0)))

    def _note_products(self) -> None:
        """Count a sum of elementwise products as multiply-adds (messages on edges, scores of a graph)."""
        tracker, name, args = self.tracker, self.seen.name, self.seen.args
        if name in ("add", "add_", "sub", "sub_"):
            labels = [tracker.label_of.get(value) for value in args[:2] if isinstance(value, Tensor)]
            found = [label for label in labels if label is not None]
            tracker.labels.added += found if len(found) == 2 else []
        if name in ("mul", "mul_") and all(_is_no_scale(a, self.seen.out) for a in args[:2]):
            tracker.multiplied[self.seen.out] = True
            return
        at = SUMMED.get(name)
        source = args[at] if at is not None and len(args) > at else None
        if isinstance(source, Tensor) and source in tracker.multiplied:
            term, label = add_empty_term(tracker, tuple(source.shape)), tracker.label_of.get(source)
            if label is not None:
                tracker.ops[term] = ProductTerm(tracker.where.strip("'"), tuple(source.shape), (label,))

    def _price(self) -> None:
        seen = self.seen
        formula = flop_registry.get(seen.func._overloadpacket)
        if seen.name in MATRIX:
            return  # the rule for products adds terms whose factors can shrink
        if formula is not None:
            macs = int(formula(*seen.args, **seen.kwargs, out_val=seen.out)) // 2
            self.tracker.ops.append(Op(name=self.tracker.where.strip("'"), coefficient=macs))
        elif seen.tensors and (seen.pointwise or not seen.followed):  # other operators only create or move values
            self.tracker.uncounted.add(seen.name.rstrip("_"))


def _is_no_scale(value: Any, out: Tensor) -> bool:
    """Return True for a factor that holds a number for each unit, also if surgery left one unit."""
    return isinstance(value, Tensor) and (value.numel() > 1 or value.ndim == out.ndim > 0)


class LabelDoesNotFit(Exception):
    """Error if a rule returns a label that cannot be expanded to the shape of the result."""


def _fits(label: Tensor, tensor: Tensor) -> bool:
    sizes = zip(label.shape, tensor.shape, strict=False)
    return label.ndim == tensor.ndim and all(held in (1, size) for held, size in sizes)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in the arguments or results of an operator, nested in tuples, lists and dicts at most."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]


def _operand(tensor: Tensor, label: Tensor | None) -> Operand:
    """Return the operand. Without a label, a dimension expanded from size 1 gets size 1."""
    if tensor.layout != torch.strided or 0 not in tensor.stride():
        return Operand(tensor.shape, label)
    held = [1] * tensor.ndim if label is None else label.shape
    expanded = tuple(d for d, stride in enumerate(tensor.stride()) if stride == 0 and held[d] == 1)
    operand = Operand(tensor.shape, label, expanded)
    return operand.without_label() if label is None else operand


def run_followed(trackers: Trackers, example_inputs: Any, *, containers: bool = False) -> ChosenOutputs:
    """Run the model in eval mode while the trackers follow, and return its outputs.

    PyTorch's transformer layers run their Python code, because a function mode is active.

    Args:
        trackers: of the model.
        example_inputs: as of ``trace``.
        containers: run the modules that have submodules in training mode.
    """
    with (
        eval_mode(trackers.model, containers=containers),
        trackers.running.watching(),
        Functions(trackers),
        Operators(trackers),
    ):
        return run_outputs(trackers.model, example_inputs, trackers.outputs, every_mode=not containers)
