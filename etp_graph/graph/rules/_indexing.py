"""Pass labels through gathers and scatters along dimensions without units: messages on edges, top-k, tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from etp_graph.graph._labels import Labels, at_running_line

from ._operators import Operand, UnknownOperator, label_of_elementwise, labelled_dims

GATHERS = frozenset("index gather take_along_dim topk _unsafe_index index_select".split())

SCATTERS = frozenset(
    "scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_ index_add index_add_ index_put "
    "index_put_ index_copy index_copy_ index_fill index_fill_ index_reduce index_reduce_ masked_scatter "
    "masked_scatter_ _unsafe_index_put".split()
)


_MASKS = (torch.bool, torch.uint8)

_INDEXED = ("index", "_unsafe_index")


def label_of_gather(
    labels: Labels, name: str, x: Operand, args: Sequence[Any], kwargs: dict[str, Any], where: str, bare: str | None
) -> Any:
    """Return the compact label of entries of ``x`` that are read along dimensions without units.

    A stored table (``bare`` is its name) whose units are not known yet may be read along any axis. This axis is
    pinned: if it turns out to hold units, they are locked.

    Raises:
        UnknownOperator: the entries are read along the units, or ``x`` has no units.
    """
    label = x.label
    if label is None:
        raise UnknownOperator
    if name in _INDEXED:
        return _label_of_index(labels, x, args[1], where, bare)
    dim = kwargs.get("dim", args[2] if name == "topk" and len(args) > 2 else _index_argument(name, args))
    dim %= label.ndim
    if label.shape[dim] > 1:
        if bare is None or name != "index_select":
            raise UnknownOperator
        labels.pinned[bare, dim] = at_running_line(f"is taken by fixed positions in {where}")
        return label.index_select(dim, args[2].cpu())
    if name in ("gather", "take_along_dim"):
        index: Tensor = args[2] if len(args) > 2 else kwargs["index"]
        if any(d != dim and index.shape[d] != x.shape[d] for d in labelled_dims(label)):
            raise UnknownOperator
    return label


def met_by_gather(
    labels: Labels, name: str, found: Tensor, indices: Sequence[Operand], args: Sequence[Any], out: Tensor, where: str
) -> Tensor | None:
    """Unite the label of the entries read with the labels of the indices.

    Indices have units if, for example, each head reads its own positions.
    """
    parts = [Operand(out.shape, found)]
    first = 0
    if name in _INDEXED:
        taken = [d for d, index in enumerate(args[1]) if index is not None]
        first = taken[0] if taken == list(range(taken[0], taken[-1] + 1)) else -1
    wide = max((len(o.shape) for o in indices), default=0)
    for operand in indices:
        if operand.label is None:
            continue
        if first < 0 or (name in _INDEXED and any(i is not None and i.dtype in _MASKS for i in args[1])):
            raise UnknownOperator
        rest = out.ndim - first - wide
        label = operand.label.reshape([1] * (first + wide - operand.label.ndim) + [*operand.label.shape] + [1] * rest)
        shape = torch.Size(out.shape[d] if label.shape[d] > 1 else 1 for d in range(out.ndim))
        parts.append(Operand(shape, label))
    if len(parts) == 1:
        return found
    united = found
    for part in parts[1:]:
        assert part.label is not None
        a, b = torch.broadcast_tensors(united, part.label)
        united = labels.unite(a, b, f"meets channels of fixed width in {where}")
    return united


def _index_argument(name: str, args: Sequence[Any]) -> Any:
    return -1 if name == "topk" else args[1]


def _label_of_index(
    labels: Labels, x: Operand, indices: Sequence[Tensor | None], where: str, bare: str | None
) -> Tensor:
    """Return the label of ``x[i, :, j]``, by indexing the label after expanding it along the indexed dimensions."""
    label = x.label
    assert label is not None
    indices = without_masks(indices)
    for dim, index in enumerate(indices):
        if index is None:
            continue
        if label.shape[dim] > 1:
            if bare is not None:
                labels.pinned[bare, dim] = at_running_line(f"is taken by fixed positions in {where}")
            elif index.numel() and not index.is_floating_point() and bool((index < 0).all()):
                tail = label.narrow(dim, label.shape[dim] + int(index.min()), -int(index.min()))
                labels.lock(tail, f"is taken from the end in {where}")
            elif not _names_all_positions(index, label.shape[dim]):
                raise UnknownOperator
        else:
            label = label.expand([x.shape[d] if d == dim else s for d, s in enumerate(label.shape)])
    picked: Tensor = torch.ops.aten.index(label, [None if i is None else i.cpu() for i in indices])
    return picked


def without_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Replace each boolean mask by the positions that it takes, one index for each of its dimensions."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype not in _MASKS:
            found.append(index)
        else:
            found += index.cpu().nonzero().unbind(1)
    return found


def _names_all_positions(index: Tensor, size: int) -> bool:
    """Return True if the index names all positions in order along one of its dimensions, as ``arange`` does."""
    long = [d for d, s in enumerate(index.shape) if s == size]
    if index.dtype == torch.bool or len(long) != 1 or index.numel() != size:
        return False
    return bool((index.flatten().cpu() == torch.arange(size, device="cpu")).all())


def label_of_scatter(
    labels: Labels, name: str, args: Sequence[Any], operands: Sequence[Operand], where: str
) -> Tensor | None:
    """Return the label of ``x`` after entries of ``source`` are written to it along dimensions without units."""
    into = operands[0]
    if name.startswith("masked_scatter"):
        return _label_of_masked_scatter(labels, operands, args[1], where)
    if "index_put" in name:
        return _label_of_index_put(labels, into, args[1], operands, where)
    dim = args[1] % len(into.shape)
    parts = [o for o in (into, operands[-1]) if len(o.shape) == len(into.shape)]
    flat = []
    for part in parts:
        if part.label is not None and part.label.shape[dim] > 1:
            raise UnknownOperator
        flat.append(Operand(torch.Size(1 if d == dim else s for d, s in enumerate(part.shape)), part.label))
    if any(o.shape != flat[0].shape for o in flat):
        raise UnknownOperator
    if into.label is None:  # an empty accumulator, whose zeros can have any width
        flat[0] = Operand(torch.Size([1] * len(into.shape)), None)
        return _label_of_accumulation(labels, flat, into, where)
    return label_of_elementwise(labels, flat, flat[0].shape, where)


def _label_of_accumulation(labels: Labels, flat: Sequence[Operand], into: Operand, where: str) -> Tensor | None:
    source = flat[-1]
    return label_of_elementwise(labels, [source], source.shape, where) if source.label is not None else None


def _label_of_masked_scatter(labels: Labels, operands: Sequence[Operand], mask: Tensor, where: str) -> Tensor | None:
    """Return the label after whole rows of the source are written where the mask is True.

    Raises:
        UnknownOperator: the mask takes only some of the units of a position, or the units lie along other dimensions.
    """
    into, _, source = operands
    dims = {d - len(o.shape) for o in (into, source) if o.label is not None for d in labelled_dims(o.label)}
    width = -min(dims, default=0)
    if operands[1].label is not None or into.shape[len(into.shape) - width :] != source.shape[-width:]:
        raise UnknownOperator
    spread = mask.expand(into.shape).flatten(-width) if width else mask
    if width and not bool((spread == spread.narrow(-1, 0, 1)).all()):
        raise UnknownOperator
    parts = [Operand(o.shape[len(o.shape) - width :], _last_dims(o.label, width)) for o in (into, source)]
    found = label_of_elementwise(labels, parts, parts[0].shape, where)
    return None if found is None else found.reshape([1] * (len(into.shape) - width) + [*found.shape])


def _last_dims(label: Tensor | None, width: int) -> Tensor | None:
    return None if label is None else label.reshape(label.shape[label.ndim - width :])


def _label_of_index_put(
    labels: Labels, into: Operand, indices: Sequence[Tensor | None], operands: Sequence[Operand], where: str
) -> Tensor | None:
    """Return the label after ``index_put``, which writes the labels of the values like the values.

    Raises:
        UnknownOperator: the call writes to some of the units only, some values have no unit, or the labels of a tensor
            without units would change along several axes.
    """
    values, masks = operands[-1], operands[1:-1]
    if len(masks) == 1 and masks[0].shape == into.shape and not sum(values.shape):  # x[x < 0] = 0
        return label_of_elementwise(labels, [into, masks[0]], into.shape, where)
    if any(mask.label is not None for mask in masks):
        raise UnknownOperator
    indices = without_masks(indices)
    for operand in (into, values):
        for d in labelled_dims(operand.label) if operand is into and operand.label is not None else ():
            index = indices[d] if d < len(indices) else None
            if index is not None and not _names_all_positions(index, into.shape[d]):
                raise UnknownOperator
    if values.label is None and not sum(values.shape):
        return into.label  # one number for all units
    old = torch.zeros([1] * len(into.shape), dtype=torch.int64) if into.label is None else into.label
    new = old.expand(into.shape).clone()
    source = torch.zeros((), dtype=torch.int64) if values.label is None else values.label.expand(values.shape)
    if values.label is not None and not bool((source > 0).all()):
        raise UnknownOperator
    torch.ops.aten.index_put_(new, [None if i is None else i.cpu() for i in indices], source)
    if into.label is None and values.label is not None:
        # Entries that are not written stay constant. They belong to the units of the entries next to them.
        for d in range(new.ndim):
            over = [o for o in range(new.ndim) if o != d]
            high = new.amax(over, keepdim=True)
            if bool(((new == 0) | (new == high)).all()) and bool((high > 0).all()):
                return high
        raise UnknownOperator
    return label_of_elementwise(labels, [into, Operand(into.shape, new)], into.shape, where)
