"""Pass labels through operators that own no weights: element-wise, pooling, joining and reduction.

Every rule gets the labels of the tensors in *compact* form. A compact label has as many dimensions as the tensor, with
size 1 for every dimension along which the labels do not change. If no rule knows an operator, its inputs are locked, so
that its outputs keep their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etp_graph.graph._labels import Labels

# Element-wise operators without torch.Tag.pointwise, and copies. The labels of their operands are united.
ELEMENTWISE = frozenset(
    "clone contiguous detach alias lift_fresh lift_fresh_copy _to_copy to copy copy_ positive native_dropout dropout "
    "zeros_like ones_like empty_like full_like rand_like randn_like bernoulli where masked_fill hardtanh leaky_relu "
    "hardswish hardsigmoid silu gelu mish elu celu selu softplus glu_jvp threshold nan_to_num clamp rrelu_with_noise "
    "fill fill_ zero_ log_sigmoid_forward dropout_ relu6 lerp addcmul addcdiv normal uniform exponential random "
    "log_normal cauchy geometric polar complex".split()
)

# name -> number of trailing spatial dimensions that the operator resizes
SPATIAL = {
    **{f"{p}{d}d": d for d in (1, 2, 3) for p in ("avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool")},
    **{f"{p}{d}d": d for d in (1, 2, 3) for p in ("adaptive_max_pool", "reflection_pad", "replication_pad")},
    **{f"max_pool{d}d_with_indices": d for d in (1, 2, 3)},
    **{name: 2 for name in ("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "max_pool2d",
                            "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")},
    **{name: 1 for name in ("upsample_nearest1d", "upsample_linear1d", "max_pool1d", "_upsample_nearest_exact1d")},
    **{name: 3 for name in ("upsample_nearest3d", "upsample_trilinear3d", "max_pool3d", "_upsample_nearest_exact3d")},
}  # fmt: skip

REDUCTIONS = frozenset(
    "mean sum amax amin max min var std var_mean std_mean linalg_vector_norm norm logsumexp argmax argmin any all "
    "prod median nanmean nansum nanmedian kthvalue mode aminmax count_nonzero".split()
)

# Reductions whose result does not change if zeros are removed.
ZERO_SAFE_SUMS = frozenset("sum nansum linalg_vector_norm norm".split())

# Operators that keep the shape, but mix the positions along one dimension.
SOFTMAX_LIKE = frozenset(
    "_softmax _log_softmax softmax log_softmax cumsum cumsum_ cumprod cumprod_ logcumsumexp sort cummax cummin "
    "argsort".split()
)

MOVEMENT = frozenset(
    "view _unsafe_view reshape _reshape_alias unsqueeze unsqueeze_ squeeze squeeze_ permute transpose transpose_ t "
    "expand flip repeat select slice index_select split split_with_sizes unbind roll pixel_shuffle pixel_unshuffle "
    "channel_shuffle native_channel_shuffle split_copy unbind_copy view_copy expand_copy permute_copy".split()
)

JOINS = frozenset(("cat", "stack"))


class UnknownOperator(Exception):
    """Error for a call through which no rule can follow the labels."""


class ReadingsDiffer(Exception):
    """Signal that a call depends on the reading (inner or outer), raised by a tracker that has none yet."""


@dataclass(slots=True)
class Operand:
    """Shape and compact label of a tensor argument. The label is ``None`` if all positions are fixed.

    ``expanded`` are dimensions that are expanded from size 1, so that they can be expanded to any width.
    """

    shape: torch.Size
    label: Tensor | None
    expanded: tuple[int, ...] = ()

    def without_label(self) -> Operand:
        """Return the operand with all positions fixed, except in expanded dimensions."""
        return Operand(torch.Size(1 if d in self.expanded else s for d, s in enumerate(self.shape)), None)


def compact_label(label: Tensor) -> Tensor | None:
    """Shrink every dimension along which the labels are constant to size 1. Return ``None`` if there are no units."""
    for d in range(label.ndim):
        if label.shape[d] > 1:
            first = label.narrow(d, 0, 1)
            if label.stride(d) == 0 or bool((label == first).all()):
                label = first
    return label if bool((label != 0).any()) else None


def labelled_dims(label: Tensor) -> list[int]:
    """Return the dimensions along which a compact label changes."""
    return [d for d in range(label.ndim) if label.shape[d] > 1]


def _align_dims(operand: Operand, ndim: int) -> tuple[tuple[int, ...], Tensor | None]:
    """Return shape and label with leading dimensions of size 1, as broadcasting would add them."""
    missing = ndim - len(operand.shape)
    shape = (1,) * missing + tuple(1 if d in operand.expanded else s for d, s in enumerate(operand.shape))
    return shape, None if operand.label is None else operand.label.reshape((1,) * missing + operand.label.shape)


def label_of_elementwise(
    labels: Labels, operands: Sequence[Operand], out: torch.Size, where: str, *, may_split: bool = False
) -> Tensor | None:
    """Unite the labels of the operands position by position, and return the compact label of the result.

    Lock units that are broadcast over other units, or that meet an operand of fixed size. Of units along two axes,
    those of operands that are not broadcast stay. If that leaves several axes or none, the inner reading keeps the
    units along the last axis, and the outer reading those along the first one.

    Raises:
        ReadingsDiffer: there are units along two axes, no reading yet, and ``may_split`` is True.
    """
    aligned = [_align_dims(op, len(out)) for op in operands]
    aligned = _with_units_on_one_axis(labels, aligned, out, where, may_split)
    dims = {d for _, label in aligned if label is not None for d in labelled_dims(label)}
    result: Tensor | None = None
    held = [(shape, label) for shape, label in aligned if label is not None]
    if len(held) > 1:  # units of layers before entries of parameters, which have become the same units
        held.sort(key=lambda pair: (pair[1].numel(), labels.is_unbound(pair[1])))
    for shape, label in held:
        if any(shape[d] == 1 and out[d] > 1 for d in dims):
            labels.lock(label, f"is broadcast over other units in {where}")
        elif result is None:
            result = label
        else:
            a, b = torch.broadcast_tensors(result, label)
            united = labels.unite(a, b, f"meets channels of fixed width in {where}")
            result = result if bool((result > 0).all()) else compact_label(united)
    fixed = {d for shape, lab in aligned if lab is None for d in dims if shape[d] > 1}
    if result is not None and fixed and labels.is_unbound(result):
        for d in fixed:
            labels.pin_axes(result, d, f"is combined with a tensor of fixed width in {where}")
    elif fixed:
        labels.lock(result, f"is combined with a tensor of fixed width in {where}")
    return result


def _with_units_on_one_axis(
    labels: Labels,
    aligned: list[tuple[tuple[int, ...], Tensor | None]],
    out: Sequence[int],
    where: str,
    may_split: bool,
) -> list[tuple[tuple[int, ...], Tensor | None]]:
    """Lock and drop the labels of operands whose units lie along another axis than those that are kept.

    Operands that are not broadcast over the units of others are kept. If these lie along several axes, or if there
    are none, the reading decides.
    """
    if len({d for _, label in aligned if label is not None for d in labelled_dims(label)}) < 2:
        return aligned
    bound = [(shape, label) for shape, label in aligned if label is not None and not labels.is_unbound(label)]
    dims = [labelled_dims(label) for _, label in bound]
    axes = {d for now in dims for d in now}
    if len(axes) == 1:
        return _with_tables_on_one_axis(labels, aligned, bound, axes.pop(), out, where, may_split)
    if len(axes) < 2 or any(len(now) != 1 for now in dims):
        return aligned
    whole = {now[0] for now, (shape, _) in zip(dims, bound, strict=True) if all(shape[d] == out[d] for d in axes)}
    candidates = whole or axes
    if len(candidates) > 1 and labels.reading is None:
        if may_split:
            raise ReadingsDiffer
        return aligned
    keeps, found = min(candidates) if labels.reading == "outer" else max(candidates), []
    if labels.by_copy and len(candidates) > 1:
        keeps = next((now[0] for now, (_, label) in zip(dims, bound, strict=True) if labels.is_copy(label)), keeps)
    for shape, label in aligned:
        other = label is not None and labelled_dims(label) != [keeps] and not labels.is_unbound(label)
        labels.lock(label if other else None, f"is broadcast over other units in {where}")
        found.append((shape, None if other else label))
    return found


def _with_tables_on_one_axis(
    labels: Labels,
    aligned: list[tuple[tuple[int, ...], Tensor | None]],
    bound: Sequence[tuple[tuple[int, ...], Tensor]],
    axis: int,
    out: Sequence[int],
    where: str,
    may_split: bool,
) -> list[tuple[tuple[int, ...], Tensor | None]]:
    """Unite the entries of parameters along all axes but one, if units along this one are broadcast over the others.

    An example is ``x[:, :, None] * A`` with A [channels, states]. The reading decides whether the units are those of x,
    or those that lie along the other axis of the parameter.
    """
    tables = [(shape, label) for shape, label in aligned if label is not None and labels.is_unbound(label)]
    others = {d for _, label in tables for d in labelled_dims(label)} - {axis}
    others = {d for d in others if any(shape[d] == 1 < out[d] for shape, _ in bound)}
    if not others or any(shape[axis] != out[axis] for shape, _ in tables):
        return aligned
    if labels.reading is None:
        if may_split:
            raise ReadingsDiffer
        return aligned
    if axis != (min(axis, *others) if labels.reading == "outer" else max(axis, *others)):
        return aligned
    found = []
    for shape, label in aligned:
        small = label
        for d in others if label is not None and labels.is_unbound(label) else ():
            small = labels.merge_dim(small, d, where)  # type: ignore[arg-type]
        found.append((shape, small))
    return found


def label_of_spatial(labels: Labels, label: Tensor, n_spatial: int) -> Tensor:
    """Return the label of a tensor whose last ``n_spatial`` dimensions are pooled or resized.

    Raises:
        UnknownOperator: the label changes along one of these dimensions.
    """
    if any(d >= label.ndim - n_spatial for d in labelled_dims(label)):
        raise UnknownOperator
    return label


def dims_of(given: dict[str, Any], ndim: int) -> list[int]:
    """Return the dimensions that an operator reduces or works along, from its arguments. ``None`` means all."""
    dim = given.get("dim")
    dims = range(ndim) if dim is None or dim == [] else ([dim] if isinstance(dim, int) else dim)
    return [d % ndim for d in dims] if ndim else []


def label_of_reduction(
    labels: Labels, label: Tensor, name: str, dims: Sequence[int], out_ndim: int, where: str
) -> Tensor | None:
    """Return the label of a mean, sum, maximum, norm or similar reduction.

    The result of a sum or a norm over all units has no units (``None``), because removing zeros does not change it.

    Raises:
        UnknownOperator: any other reduction along units that are not complete runs of a tie.
    """
    now = labelled_dims(label)
    if name in ZERO_SAFE_SUMS and set(now) <= set(dims):
        return None
    for d in set(dims) & set(now):
        if not labels.holds_whole_runs(label, d):
            raise UnknownOperator
        label = labels.merge_dim(label, d, where)
    if len(now) == 1 and list(dims) == [now[0] + 1] and name in ZERO_SAFE_SUMS:
        labels.headed.append(label.flatten())  # a product with one vector per head, as in GAT
    keep = out_ndim == label.ndim
    return label if keep else label.reshape([s for d, s in enumerate(label.shape) if d not in dims])


def label_of_softmax(label: Tensor, dims: Sequence[int]) -> Tensor:
    """Return the label for softmax, cumulative sums and sorting.

    Raises:
        UnknownOperator: the operator works along the units.
    """
    if set(dims) & set(labelled_dims(label)):
        raise UnknownOperator
    return label


def label_of_join(labels: Labels, name: str, operands: Sequence[Operand], dim: int, where: str) -> Tensor | None:
    """Return the label of ``cat`` or ``stack``. Concatenate labels along the units, unite them across the units."""
    if name == "stack":
        ndim = len(operands[0].shape) + 1
        dim %= ndim
        operands = [
            Operand(
                torch.Size((*o.shape[:dim], 1, *o.shape[dim:])),
                None if o.label is None else o.label.unsqueeze(dim),
                tuple(d + (d >= dim) for d in o.expanded),
            )
            for o in operands
        ]
    operands = [o for o in operands if len(o.shape) == max(len(p.shape) for p in operands)]
    dim %= len(operands[0].shape)
    operands = [o for o in operands if o.shape[dim]] or operands  # empty tensors add nothing
    if labels.reading is not None:
        pairs = [(tuple(1 if d == dim else s for d, s in enumerate(o.shape)), o.label) for o in operands]
        kept = _with_units_on_one_axis(labels, pairs, pairs[0][0], where, may_split=False)
        operands = [o if label is o.label else o.without_label() for o, (_, label) in zip(operands, kept, strict=True)]
    dims = {d for o in operands if o.label is not None for d in labelled_dims(o.label)}
    if dims - {dim} and not (dim in dims and all(o.label is None or labels.is_unbound(o.label) for o in operands)):
        if dim in dims:
            raise UnknownOperator
        flat = [Operand(torch.Size(1 if d == dim else s for d, s in enumerate(o.shape)), o.label) for o in operands]
        return label_of_elementwise(labels, flat, flat[0].shape, where)
    pieces = []
    for o in operands:
        shape = [s if d in {dim, *dims} else 1 for d, s in enumerate(o.shape)]
        pieces.append(torch.zeros(shape, dtype=torch.int64, device="cpu") if o.label is None else o.label.expand(shape))
    return torch.cat(pieces, dim)
