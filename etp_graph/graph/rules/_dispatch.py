"""Table of the rules for operators, with one row for each set of operator names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etp_graph.graph._tracker import Tracker
from etp_graph.model import PADDINGS

from ._channelwise import CHANNELWISE, label_of_channelwise
from ._indexing import GATHERS, SCATTERS, label_of_gather, label_of_scatter, met_by_gather
from ._movement import run_on_labels
from ._operators import (
    JOINS,
    MOVEMENT,
    REDUCTIONS,
    SOFTMAX_LIKE,
    SPATIAL,
    Operand,
    UnknownOperator,
    dims_of,
    label_of_elementwise,
    label_of_join,
    label_of_reduction,
    label_of_softmax,
    label_of_spatial,
    labelled_dims,
)
from ._products import MATRIX, label_of_matrix_product, label_of_solution

SOLVERS = frozenset(("linalg_solve_triangular",))
"""Operators that solve systems of linear equations."""

FOLLOWED = MOVEMENT | JOINS | REDUCTIONS | GATHERS | SCATTERS | CHANNELWISE | {"constant_pad_nd", "t_"}
"""Operators that pass on the labels of bare parameters, besides element-wise ones."""

MAKERS = frozenset(("new_zeros", "new_ones", "new_empty", "new_full"))
"""Operators that create a tensor from another one without using its values. Some sizes may be those of the other."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an operator, with its tensors and their labels."""

    tracker: Tracker
    func: Any
    name: str
    args: Any
    kwargs: Any
    operands: Sequence[Operand]
    outs: Sequence[Tensor]
    pointwise: bool

    @property
    def given(self) -> dict[str, Any]:
        """The arguments by name, with the defaults of the operator."""
        return given_arguments(self.func, self.args, self.kwargs)

    @property
    def label(self) -> Tensor:
        """The label of the first operand.

        Raises:
            UnknownOperator: the first operand has no label, or another operand has one, too.
        """
        if sum(operand.label is not None for operand in self.operands) > 1 or self.operands[0].label is None:
            raise UnknownOperator
        return self.operands[0].label


def given_arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of an operator by name, with its defaults."""
    found: dict[str, Any] = {argument.name: argument.default_value for argument in func._schema.arguments}
    found.update(zip(list(found), args, strict=False))
    found.update(kwargs)
    return found


def label_of_result(call: Call) -> Any:
    """Return the label of the result, or of each result.

    Raises:
        UnknownOperator: no rule can follow the units.
    """
    if call.pointwise:
        labels, where = call.tracker.labels, call.tracker.where
        return label_of_elementwise(labels, call.operands, call.outs[0].shape, where, may_split=True)
    if call.name not in _RULES:
        raise UnknownOperator
    return _RULES[call.name](call)


def _join_rule(call: Call) -> Tensor | None:
    dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else 0)
    return label_of_join(call.tracker.labels, call.name, call.operands, dim, call.tracker.where)


def _made_like(call: Call) -> Tensor | None:
    """Return the label of the operand if the new tensor has the same size along the units.

    The code that makes the call says where its sizes come from, see ``Tracker.count_sizes``. Only if PyTorch itself
    makes the call, the sizes are all that there is to see.
    """
    if call.tracker.sizes is not None:
        return None
    operand, out = call.operands[0], call.outs[0].shape
    label = operand.label
    if label is None or len(out) != label.ndim or any(out[d] != operand.shape[d] for d in labelled_dims(label)):
        return None
    return label


def _matrix_rule(call: Call) -> Tensor | None:
    return label_of_matrix_product(call.tracker, call.name, call.operands, call.outs[0].shape)


def _solver_rule(call: Call) -> Tensor | None:
    return label_of_solution(call.tracker.labels, call.operands, call.given, call.tracker.where)


def _scatter_rule(call: Call) -> Tensor | None:
    return label_of_scatter(call.tracker.labels, call.name, call.args, call.operands, call.tracker.where)


def _gather_rule(call: Call) -> Tensor | None:
    tracker, first = call.tracker, call.operands[0]
    bare = tracker.weights.bare_name(call.args[0])
    found = label_of_gather(tracker.labels, call.name, first, call.args, call.kwargs, tracker.where, bare)
    return met_by_gather(tracker.labels, call.name, found, call.operands[1:], call.args, call.outs[0], tracker.where)


def _spatial_rule(call: Call) -> Tensor:
    return label_of_spatial(call.tracker.labels, call.label, SPATIAL[call.name])


def _channelwise_rule(call: Call) -> Tensor | None:
    where = call.tracker.where
    return label_of_channelwise(call.tracker.labels, call.func, call.name, call.operands, call.given, where)


def _reduction_rule(call: Call) -> Tensor | None:
    dims, ndim = dims_of(call.given, call.label.ndim), call.outs[0].ndim
    return label_of_reduction(call.tracker.labels, call.label, call.name, dims, ndim, call.tracker.where)


def _softmax_rule(call: Call) -> Tensor:
    return label_of_softmax(call.label, dims_of(call.given, call.label.ndim))


def _reshaped_in_place(call: Call) -> Tensor:
    """Return the label after an operator that has changed the shape of its operand, which nobody knows any more."""
    label, given, ndim = call.label, call.given, call.outs[0].ndim
    if call.name == "unsqueeze_":
        return label.unsqueeze(given["dim"])
    if call.name == "squeeze_" and (ndim == label.ndim or isinstance(given.get("dim"), int)):
        return label if ndim == label.ndim else label.squeeze(given["dim"])
    if call.name == "transpose_":
        return label.transpose(given["dim0"], given["dim1"])
    if call.name == "t_":
        return label.t()
    raise UnknownOperator


def _movement_rule(call: Call) -> Any:
    tracker, operand = call.tracker, Operand(call.operands[0].shape, call.label)
    return run_on_labels(
        tracker.labels, call.func, call.name, operand, call.args, call.kwargs, tracker.where, tracker.reading,
        tracker.sizes,
    )  # fmt: skip


def _padding_rule(call: Call) -> Tensor:
    """Return the label after padding. If the running module declares the widths, the padding consists of new units.

    A negative width crops positions without units.
    """
    label, pads = call.label, list(call.args[1])
    widths = [(pads[2 * i], pads[2 * i + 1]) for i in range(len(pads) // 2)][::-1]
    for dim, (before, after) in enumerate(widths, label.ndim - len(widths)):
        if label.shape[dim] == 1:
            continue
        if min(before, after) < 0:
            raise UnknownOperator
        ends = [_padding_units(call.tracker, side, width) for side, width in enumerate((before, after))]
        shape = [-1 if d == dim else 1 for d in range(label.ndim)]
        sizes = [[len(end) if d == dim else size for d, size in enumerate(label.shape)] for end in ends]
        first, last = (end.view(shape).expand(size) for end, size in zip(ends, sizes, strict=True))
        label = torch.cat([first, label, last], dim)
    return label


def _padding_units(tracker: Tracker, side: int, width: int) -> Tensor:
    module = tracker.modules[-1] if tracker.modules else None
    names = PADDINGS.get(type(module))  # type: ignore[arg-type]
    if names is None or width <= 0:
        return torch.zeros(max(width, 0), dtype=torch.int64, device="cpu")
    ids = tracker.labels.new_labels(width)
    tracker.labels.count((str(tracker.weights.module_name(module)), names[side], None), ids)
    return ids


_RULES: Mapping[str, Callable[[Call], Any]] = {
    **dict.fromkeys(MOVEMENT, _movement_rule),
    **dict.fromkeys(("unsqueeze_", "squeeze_", "transpose_", "t_"), _reshaped_in_place),
    **dict.fromkeys(JOINS, _join_rule),
    **dict.fromkeys(MAKERS, _made_like),
    **dict.fromkeys(MATRIX, _matrix_rule),
    **dict.fromkeys(SOLVERS, _solver_rule),
    **dict.fromkeys(SCATTERS, _scatter_rule),
    **dict.fromkeys(GATHERS, _gather_rule),
    **dict.fromkeys(SPATIAL, _spatial_rule),
    **dict.fromkeys(CHANNELWISE, _channelwise_rule),
    **dict.fromkeys(REDUCTIONS, _reduction_rule),
    **dict.fromkeys(SOFTMAX_LIKE, _softmax_rule),
    "constant_pad_nd": _padding_rule,
}
