"""Pass labels through operators that move positions: views, slices, splits and permutations.

They are applied to the labels themselves. Units are united or locked where a pruned tensor would be moved in another
way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from etp_graph.graph._counted_sizes import Sizes
from etp_graph.graph._labels import Labels, Reading
from etp_graph.graph._traced_numbers import TracedInt

from ._operators import Operand, ReadingsDiffer, UnknownOperator, compact_label, labelled_dims


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
