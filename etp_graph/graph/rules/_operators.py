"""Pass labels through operators that own no weights: element-wise, movement, pooling and reduction.

Every rule gets the labels of the tensors in *compact* form. A compact label has as many dimensions as the tensor, with
size 1 for every dimension along which the labels do not change. Movement operators are applied to the labels
themselves. If no rule knows an operator, its inputs are locked, so that its outputs keep their size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etp_graph.graph._counted_sizes import Sizes
from etp_graph.graph._labels import Labels, Reading
from etp_graph.graph._traced_numbers import TracedInt

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


def run_on_labels(
    labels: Labels, func: Callable[..., Any], name: str, operand: Operand, args: Sequence[Any], kwargs: dict[str, Any],
    where: str, facet: Reading | None, sizes: Sizes | None,
) -> Any:  # fmt: skip
    """Apply the operator to the labels. Lock or unite units if it would give another result on a pruned tensor."""
    label = operand.label
    assert label is not None
    dims = labelled_dims(label)
    full = label.expand(operand.shape)
    if any(isinstance(arg, torch.dtype) for arg in args):
        raise UnknownOperator  # view(dtype) reinterprets the bytes
    if name in ("channel_shuffle", "native_channel_shuffle") and label.shape[1] > 1:
        pieces = full.unflatten(1, (args[1], -1))
        labels.unite(pieces, pieces[:, :1].expand_as(pieces), f"meets channels of fixed width in {where}")
    if name in ("slice", "select", "index_select", "roll", "unbind"):
        counted = sizes.sliced if sizes else set()
        _fixed_positions(labels, name, label, operand.shape, args, kwargs, where, counted)
    rest = [arg.cpu() if isinstance(arg, Tensor) else arg for arg in args[1:]]  # labels are on the CPU
    moved: Any = torch.reshape(full, args[1]) if name in ("view", "_unsafe_view") else func(full, *rest, **kwargs)
    if name in ("split", "split_with_sizes"):
        return (
            moved
            if sizes and sizes.pieces and not sizes.parts
            else _tie_pieces(labels, name, label, moved, args, kwargs, where)
        )
    if name == "expand" and (small := compact_label(moved)) is not None:
        _lock_written_numbers(labels, small, sizes, where)
    if name in ("view", "_unsafe_view", "reshape", "_reshape_alias", "pixel_shuffle"):
        survives = moved.ndim - 3 if name == "pixel_shuffle" else None
        return _tie_folded(labels, moved, dims, where, survives, facet, sizes)
    return moved


def _fixed_positions(
    labels: Labels, name: str, label: Tensor, shape: torch.Size, args: Sequence[Any], kwargs: dict[str, Any],
    where: str, counted: set[int],
) -> None:  # fmt: skip
    dims = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if name == "roll":
        dims = kwargs.get("dims", args[2] if len(args) > 2 else ()) or range(len(shape))
    for dim in (d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)):
        if label.shape[dim] == 1 or (name == "slice" and dim in counted) or labels.holds_whole_runs(label, dim):
            continue
        if name == "slice":
            start, end, step = (*args[2:], *(None, None, None)[len(args) - 2 :])[:3]
            if not start and (end is None or end >= shape[dim]) and step in (None, 1):
                continue
            if step in (None, 1) and (tail := _tail_length(start, end, shape[dim])):
                labels.lock(label.narrow(dim, shape[dim] - tail, tail), f"is taken from the end in {where}")
                continue
        labels.lock(label, f"is taken by fixed positions ({name}) in {where}")


def _tail_length(start: int | None, end: int | None, size: int) -> int:
    """Return how many positions at the end a slice keeps (``[-2:]``) or drops (``[:-2]``), or 0 for other slices."""
    if not start and end is not None and end < 0:
        return -end
    return -start if start is not None and start < 0 and (end is None or end >= size) else 0


def _tie_pieces(
    labels: Labels, name: str, label: Tensor, pieces: Sequence[Tensor], args: Sequence[Any], kwargs: dict[str, Any],
    where: str,
) -> Sequence[Tensor]:  # fmt: skip
    """Unite the units of equal pieces, so that ``chunk`` gives equal pieces again. Lock units of unequal pieces."""
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0) % label.ndim
    if label.shape[dim] > 1 and not labels.holds_whole_runs(label, dim):
        if name == "split" and len({piece.shape[dim] for piece in pieces}) == 1:
            for piece in pieces[1:]:
                labels.unite(pieces[0], piece, f"meets channels of fixed width in {where}")
        else:
            labels.lock(label, f"is split into pieces of fixed widths in {where}")
    return pieces


def _tie_folded(
    labels: Labels, moved: Tensor, dims: list[int], where: str, survives: int | None, facet: Reading | None,
    sizes: Sizes | None,
) -> Tensor:  # fmt: skip
    """Return the label after an operator that may fold the unit axis into several axes.

    One of these axes holds the units, and the sizes of the others are fixed. Units that differ only along the fixed
    axes are united. The axis that holds the units can be the inner one (channels of a shuffle, dimensions of a head)
    or the outer one (heads), so the trace follows both readings. The check of the trace finds wrong guesses.
    """
    small = compact_label(moved)
    if small is None:
        return moved
    now = labelled_dims(small)
    if len(now) <= max(len(dims), 1):
        _lock_written_numbers(labels, small, sizes, where)
        return small
    if labels.is_unbound(small):
        return small
    if survives is None:
        if facet is None:
            raise ReadingsDiffer
        survives = _surviving_dim(labels, now, small, facet, sizes)
        if sizes is not None and sizes.follows(survives) is False and sizes.named[survives]:
            labels.lock(small, f"a view in {where} writes their number ({int(sizes.named[survives])})")
    first = small
    for d in now:
        first = first if d == survives or labels.holds_whole_runs(small, d) else first.narrow(d, 0, 1)
    labels.fold_axis(small, first, f"meets channels of fixed width in {where}")
    if labels.by_copy and len(now) > 1 and survives == now[1] and survives != now[-1 if len(now) > 2 else 0]:
        labels.copies.append(first[first > 0])
    return first


def _lock_written_numbers(labels: Labels, label: Tensor, sizes: Sizes | None, where: str) -> None:
    """Lock the units along dimensions whose size is a plain number in the code."""
    for d in labelled_dims(label) if sizes is not None else ():
        size = sizes.named[d] if d < len(sizes.named) else 0  # type: ignore[union-attr]
        if size > 0 and not isinstance(size, TracedInt) and not labels.is_unbound(label):
            labels.lock(label, f"a view in {where} writes their number ({size})")


def _surviving_dim(labels: Labels, now: list[int], small: Tensor, facet: Reading, sizes: Sizes | None) -> int:
    """Return the folded axis that holds the units.

    The candidates are the axes that are longer than 4, or whose size is written as -1 or by an attribute, if there are
    at least two of them. Else they are all folded axes. Query heads that are folded into groups x heads of a group
    have a reading of their own, as copies of heads do.

    Raises:
        ReadingsDiffer: the axes are those of groups and of heads of a group, and the reading of copies is not chosen.
    """
    if (only := _open_dim(now, sizes)) is not None:
        return only
    # Other axes are short and have a plain number as size, such as the 3 of a fused query, key, value.
    known = [d for d in now if small.shape[d] > 4 or (sizes is not None and sizes.follows(d))]
    pool = known if len(known) > 1 else now
    if facet == "outer" and (len(known) == 3 or (len(known) == 2 and labels.is_folded(small))):
        if labels.by_copy is None:
            raise ReadingsDiffer
        return pool[labels.by_copy]
    return pool[0] if facet == "outer" else pool[-1]


def _open_dim(now: list[int], sizes: Sizes | None) -> int | None:
    """Return the only axis that can have another size in a pruned model, or ``None`` if there are several or none.

    The sizes of the others are plain numbers in the code. If one tuple of ``nn.Unflatten`` gives all sizes, the first
    axis holds the channels.
    """
    if sizes is None:
        return None
    origins = [getattr(sizes.named[d], "origin", None) for d in now if d < len(sizes.named)]
    if len({origin and origin[:2] for origin in origins}) == 1 and all(o and o[2] is not None for o in origins):
        return now[0]
    free = [d for d in now if sizes.follows(d)]
    return free[0] if len(free) == 1 and all(sizes.follows(d) is not None for d in now) else None
