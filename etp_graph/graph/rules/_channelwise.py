"""Pass labels through operators that work on each channel by itself, or that combine channels in a known way.

Such operators sample, pad, sort or transform positions. Units along these positions are mixed. Units along any other
dimension keep their label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from etp_graph.graph._labels import Labels

from ._operators import Operand, UnknownOperator, label_of_elementwise, labelled_dims

_SPECTRA = ("_fft_r2c", "_fft_c2c", "_fft_c2r")

_MIXED: Mapping[str, Callable[[dict[str, Any], int], Sequence[int]]] = {
    **dict.fromkeys(_SPECTRA, lambda given, ndim: given["dim"]),
    **dict.fromkeys(("triu", "tril", "triu_", "tril_"), lambda given, ndim: (-2, -1)),
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d"), lambda given, ndim: range(2, ndim)),
    **dict.fromkeys(("roi_align", "roi_pool"), lambda given, ndim: (0, 2, 3)),
    "rot90": lambda given, ndim: given["dims"],
    "diagonal": lambda given, ndim: (given["dim1"], given["dim2"]),
    "unfold": lambda given, ndim: (given["dimension"],),
}
"""Operator -> the dimensions of its first operand along which it mixes positions."""

_RESHAPING = frozenset(("diagonal", "unfold", "rot90"))
"""Those among them whose result has its dimensions in other places, so that the label has to be moved, too."""

CHANNELWISE = frozenset(
    (*_MIXED, "glu", "im2col", "col2im", "max_unpool2d", "max_unpool3d", "view_as_real", "view_as_complex")
)


def label_of_channelwise(
    labels: Labels, func: Any, name: str, operands: Sequence[Operand], given: dict[str, Any], where: str
) -> Tensor | None:
    """Return the label of the result of one of the operators :data:`CHANNELWISE`.

    Args:
        labels: labels of the trace.
        func: the operator.
        name: its name.
        operands: its tensors.
        given: its arguments by name, with defaults.
        where: the running module, for messages.

    Raises:
        UnknownOperator: the operator mixes positions along the units.
    """
    if name.startswith("max_unpool"):
        return _label_of_unpooling(labels, operands, 2 if name.endswith("2d") else 3, where)
    label = operands[0].label
    if label is None or any(operand.label is not None for operand in operands[1:]):
        raise UnknownOperator
    if name in _RULES:
        return _RULES[name](labels, label, given, where)
    mixed = {d % label.ndim for d in _MIXED[name](given, label.ndim)}
    if mixed & set(labelled_dims(label)):
        raise UnknownOperator
    if name not in _RESHAPING:
        return label
    moved = {key: value for key, value in given.items() if key not in ("self", "size", "step")}
    if name == "unfold":
        return label.unsqueeze(-1)
    return func(label, **moved)  # type: ignore[no-any-return]


def _label_of_unpooling(labels: Labels, operands: Sequence[Operand], spatial: int, where: str) -> Tensor | None:
    """Unite the units of the values with those of their indices, which come from the same pooling."""
    flat = []
    for operand in operands:
        size = [1 if d >= len(operand.shape) - spatial else s for d, s in enumerate(operand.shape)]
        if operand.label is not None and any(d >= operand.label.ndim - spatial for d in labelled_dims(operand.label)):
            raise UnknownOperator
        flat.append(Operand(torch.Size(size), operand.label))
    return label_of_elementwise(labels, flat, flat[0].shape, where)


def _glu(labels: Labels, label: Tensor, given: dict[str, Any], where: str) -> Tensor:
    """Unite the units of both halves, one of which gates the other."""
    dim = given["dim"] % label.ndim
    if label.shape[dim] == 1:
        return label
    first, second = label.chunk(2, dim)
    return labels.unite(first, second, f"meets channels of fixed width in {where}")


def _im2col(labels: Labels, label: Tensor, given: dict[str, Any], where: str) -> Tensor:
    """[n, c, h, w] -> [n, c * kernel, positions]: each channel has as many rows as the kernel has entries."""
    if any(d >= label.ndim - 2 for d in labelled_dims(label)):
        raise UnknownOperator
    rows: Tensor = label.flatten(-2)
    return rows.repeat_interleave(_kernel(given), -2) if label.shape[-3] > 1 else rows


def _col2im(labels: Labels, label: Tensor, given: dict[str, Any], where: str) -> Tensor:
    """[n, c * kernel, positions] -> [n, c, h, w]: the rows of a channel stay or go together."""
    if label.shape[-1] > 1:
        raise UnknownOperator
    if label.shape[-2] == 1:
        return label.unsqueeze(-1)
    rows: Tensor = label.unflatten(-2, (-1, _kernel(given)))
    first = rows.narrow(-2, 0, 1)
    labels.unite(rows, first.expand_as(rows), f"meets channels of fixed width in {where}")
    return first


def _kernel(given: dict[str, Any]) -> int:
    height, width = given["kernel_size"]
    return int(height) * int(width)


def _as_real(labels: Labels, label: Tensor, given: dict[str, Any], where: str) -> Tensor:
    return label.unsqueeze(-1)


def _as_complex(labels: Labels, label: Tensor, given: dict[str, Any], where: str) -> Tensor:
    """Unite the units that become the two parts of a complex number."""
    first = label.narrow(-1, 0, 1)
    if label.shape[-1] > 1:
        labels.unite(label, first.expand_as(label), f"meets channels of fixed width in {where}")
    return first.squeeze(-1)


_RULES: Mapping[str, Callable[[Labels, Tensor, dict[str, Any], str], Tensor]] = {
    "glu": _glu, "im2col": _im2col, "col2im": _col2im, "view_as_real": _as_real, "view_as_complex": _as_complex,
}  # fmt: skip
