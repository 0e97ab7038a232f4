"""Build groups from resolved labels. Units with the same signature form one group."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import gcd

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from etp_graph.graph.rules._operators import compact_label, labelled_dims
from etp_graph.plan import NO_UNIT, Attribute, Group, Index, Slice, add_line

from ._labels import EqualRuns, Labels, Locks, Reading
from ._ties import ResolvedRuns, connected_sets, resolve_ties

Ints = npt.NDArray[np.int64]

_SPREAD = 0x1E3779B97F4A7C15
"""Large odd factor for the number of a reason, so that one key can distinguish places and reasons."""


@dataclass(slots=True)
class _Place:
    """Tensor axis or module attribute, with the unit (representative label, 0: none) of each position."""

    key: tuple[str, int] | tuple[str, str, int | None]
    units: Tensor
    passive: bool = False


def build_groups(labels: Labels, bare: dict[str, Tensor], facet: Reading = "inner") -> tuple[Group, ...]:
    """Build the groups of a trace, in the order of their first producers.

    Units form one group if they lie on the same tensor axes, equally often on each, and are locked for the same reason
    or not at all. Units of a group can therefore be ranked against each other.
    """
    root, locks = labels.resolve()
    units = _units_by_producer(labels, root)
    places = list(_iter_places(labels, bare, root, units, locks))
    tied = resolve_ties(labels.ties.values(), root, locks)
    parts = _partition_units(root, units, places, locks, tied)
    if joined := list(_ties_of_norms(labels, root, units, *parts)):
        tied = resolve_ties([*labels.ties.values(), *joined], root, locks)
        parts = _partition_units(root, units, places, locks, tied)
    group_of, position, reasons = parts
    n_groups = len(reasons)
    slices, attributes = _slices_and_attributes(places, group_of, position, n_groups)
    sizes = torch.bincount(group_of[units], minlength=n_groups).tolist() if len(units) else []
    names, kinds = _names_and_kinds(labels, root, group_of, n_groups)
    floors = [2 if n else 1 for n in _groups_with(labels, root, group_of, n_groups, labels.normalised)]
    folded = _groups_with(labels, root, group_of, n_groups, labels.folded)
    if facet == "outer":
        headed = _groups_with(labels, root, group_of, n_groups, labels.headed)
        kinds = ["heads" if f and h else kind for f, h, kind in zip(folded, headed, kinds, strict=True)]
        copied = _groups_with(labels, root, group_of, n_groups, labels.copies)
        kinds = ["query_heads" if c else kind for c, kind in zip(copied, kinds, strict=True)]
    groups = [
        Group(name=names[g], kind=kinds[g], n_units=sizes[g], slices=tuple(slices[g]),
              attributes=tuple(attributes[g]), min_units=min(floors[g], sizes[g]), locked=reasons[g], folded=folded[g])
        for g in range(n_groups)
    ]  # fmt: skip
    for together in tied:
        g = int(group_of[together.units[0, 0]])
        groups[g] = replace(groups[g], blocks=len(together.units), min_units=together.min_units)
    _set_minimums(groups, labels, root, group_of)
    for ids, blocks, where, line in labels.blocks:
        uneven = f"its channels do not fill the {blocks} normalisation groups of {where} evenly"
        _keep_blocks_equal(groups, root[ids], group_of, position, blocks, add_line(uneven, line))
    return tuple(groups)


def _units_by_producer(labels: Labels, root: Tensor) -> Tensor:
    """Return the units in the order in which their first producers run.

    The labels are not in this order, because entries of bare parameters have labels, too.
    """
    made = [root[labels.axes[producer.axis]] for producer in labels.producers.values()]
    flat = torch.cat(made) if made else root[:0]
    units, first = np.unique(flat[flat > 0].numpy(), return_index=True)
    return torch.from_numpy(units[first.argsort()])


def _slices_and_attributes(
    places: Sequence[_Place], group_of: Tensor, position: Tensor, n_groups: int
) -> tuple[list[list[Slice]], list[list[Attribute]]]:
    """Return the slices and the attributes of each group."""
    slices: list[list[Slice]] = [[] for _ in range(n_groups)]
    attributes: list[list[Attribute]] = [[] for _ in range(n_groups)]
    flat = torch.cat([place.units for place in places]) if places else torch.zeros(0, dtype=torch.int64, device="cpu")
    owners, units = group_of[flat].numpy(), position[flat].numpy()
    ends = np.cumsum([len(place.units) for place in places]).tolist()
    for place, start, end in zip(places, [0, *ends], ends, strict=False):
        for group, index, unit in _split_by_group(owners[start:end], units[start:end]):
            if len(place.key) == 2:
                tensor, axis = place.key
                piece = Slice(tensor=tensor, axis=axis, index=index, unit=unit, passive=place.passive)
                slices[group].append(piece)
            else:
                module, name, item = place.key
                attributes[group].append(Attribute(module=module, name=name, item=item, index=index, unit=unit))
    return slices, attributes


def _set_minimums(groups: list[Group], labels: Labels, root: Tensor, group_of: Tensor) -> None:
    """Set the minimum number of units that each group keeps, and the number that it must be a multiple of.

    Units that each have several positions of an axis keep it at a multiple with fewer units.
    """
    for found, name in ((labels.floors, "min_units"), (labels.multiples, "multiple")):
        for ids, number in found:
            units = root[ids]
            for owner in set(group_of[units].tolist()) - {NO_UNIT}:
                least = number
                if name == "multiple":
                    positions = units[group_of[units] == owner].unique(return_counts=True)[1]
                    least = number // gcd(number, *positions.tolist())
                value = max(getattr(groups[owner], name), least)
                groups[owner] = replace(groups[owner], **{name: min(value, groups[owner].n_units)})


def _groups_with(labels: Labels, root: Tensor, group_of: Tensor, n_groups: int, found: list[Tensor]) -> list[bool]:
    """Return for each group whether it has a unit among the labels found."""
    flags = torch.zeros(n_groups + 1, dtype=torch.bool, device="cpu")
    flags[group_of[labels.mark_members(root, found)]] = True  # NO_UNIT reads the last entry
    return flags[:n_groups].tolist()


def _iter_places(
    labels: Labels, bare: dict[str, Tensor], root: Tensor, units: Tensor, locks: Locks
) -> Iterator[_Place]:
    unit = torch.zeros_like(root)
    unit[units] = units
    unit = unit[root]
    for axis, ids in labels.axes.items():
        yield _Place(axis, unit[ids], axis in labels.passive)
    for key, ids in labels.attributes.items():
        yield _Place(key, unit[ids])
    for key, ids, dim in labels.guesses:
        small = compact_label(unit[ids])
        if small is not None and labelled_dims(small) == [dim] and key not in labels.attributes:
            yield _Place(key, small.flatten())
    for name, ids in sorted(bare.items()):  # a forward may read tables in the order of a set
        small = compact_label(_fill_unread(unit[ids], locks.code[root[ids]] > 0))
        if small is not None:
            yield from _table_places(labels, name, small, ids.numel(), locks)


def _table_places(labels: Labels, name: str, small: Tensor, numel: int, locks: Locks) -> Iterator[_Place]:
    """Yield the axis of a bare parameter that holds units.

    Lock the units if they do not lie along one axis, or if the axis is read at fixed positions.
    """
    dims = labelled_dims(small)
    several = add_line(f"meets several axes of the parameter {name}", labels.read_at.get(name))
    reason = several if len(dims) > 1 or numel > 1 else None
    if len(dims) == 1:
        at = labels.pinned.get((name, dims[0]))
        reason = None if at is None else f"{name} {at}"
        yield _Place((name, dims[0]), small.flatten())
    if reason is not None:
        locks.add(small.unique(), reason)


def _fill_unread(units: Tensor, locked: Tensor) -> Tensor:
    """Assign entries of a stored table that no forward read to the units of the entries next to them."""
    if bool((units > 0).all()) or not bool((units > 0).any()):
        return units
    free = (units == 0) & ~locked
    for d in range(units.ndim):
        over = [other for other in range(units.ndim) if other != d]
        high = units.amax(over, keepdim=True) if over else units
        if bool((free | (units == high)).all()) and bool((high > 0).all()):
            return high.expand_as(units)
    return units


def _partition_units(
    root: Tensor, units: Tensor, places: Sequence[_Place], locks: Locks, tied: Sequence[ResolvedRuns]
) -> tuple[Tensor, Tensor, list[str | None]]:
    """Return the group of each label, the position of each label in its group, and the lock reason of each group."""
    signature = torch.zeros(len(root), dtype=torch.int64, device="cpu")
    for place in places:
        if len(place.key) > 2:
            continue  # attributes only count units
        signature.index_add_(0, place.units, torch.full_like(place.units, _hash_place(place.key)))
    for number, together in enumerate(tied):
        signature[together.units] = _hash_place(number)  # tied units form one group, on whatever axes they lie
    kind = torch.tensor(locks.kinds, device="cpu")[locks.code]  # lines of the code do not tell units apart
    keys = (signature[units] + kind[units] * _SPREAD).numpy()
    _, first, number_of, sizes = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first)  # groups in the order of their first units
    group = np.argsort(order)[number_of]
    starts = sizes[order].cumsum() - sizes[order]
    by_group = np.argsort(group, kind="stable")
    at = np.empty_like(by_group)
    at[by_group] = np.arange(len(units)) - starts[group[by_group]]
    group_of = torch.full((len(root),), NO_UNIT, device="cpu")
    position = torch.zeros(len(root), dtype=torch.int64, device="cpu")
    group_of[units], position[units] = torch.from_numpy(group), torch.from_numpy(at)
    for together in tied:
        position[together.units] = torch.arange(together.units.numel(), device="cpu").view_as(together.units)
    return (
        group_of,
        position,
        [locks.reasons[code] for code in locks.code[units[torch.from_numpy(first[order])]].tolist()],
    )


def _ties_of_norms(
    labels: Labels, root: Tensor, units: Tensor, group_of: Tensor, position: Tensor, reasons: Sequence[str | None]
) -> Iterator[EqualRuns]:
    """Yield a tie for groups that a group norm joins, as one over a concatenation does.

    If equal runs of their units stay equally long, every normalisation group keeps equally many channels. The runs are
    as long as all norms of these groups allow.
    """
    spans = [(root[ids], len(ids) // n, where, line) for ids, n, where, line in labels.blocks]
    owners = [set(group_of[ids].tolist()) for ids, *_ in spans]
    joining = [i for i, mine in enumerate(owners) if len(mine) > 1 and NO_UNIT not in mine]
    joining = [i for i in joining if all(reasons[owner] is None for owner in owners[i])]
    if not joining:
        return
    for members in connected_sets([owners[i] for i in joining], len(reasons)):
        found = [spans[joining[m]] for m in members]
        together = sorted(set().union(*(owners[joining[m]] for m in members)))
        own = [units[group_of[units] == owner] for owner in together]
        lengths = [len(each) for each in own]
        for ids, width, *_ in found:
            at = position[ids]
            starts = ((group_of[ids][1:] != group_of[ids][:-1]) | (at[1:] != at[:-1] + 1)).nonzero().flatten() + 1
            lengths += [width, int(at[0]), *starts.tolist(), *at[starts].tolist()]
        if (size := gcd(*lengths)) > 1:
            ordered = [each[position[each].argsort()] for each in own]
            yield EqualRuns(torch.cat(ordered).view(-1, size), 1, found[0][2], found[0][3])


def _hash_place(key: object) -> int:
    """Return a number for a place. The sum over the places of a unit identifies this set of places."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little", signed=True)


def _split_by_group(groups: Ints, units: Ints) -> Iterator[tuple[int, Index, Index]]:
    """Yield every group on an axis, with the ascending positions of its units and the numbers of these units."""
    if not len(groups) or (groups == groups[0]).all():
        if len(groups) and groups[0] != NO_UNIT:
            yield int(groups[0]), range(len(groups)), _compact_index(units)
        return
    order = np.argsort(groups, kind="stable")
    order = order[np.searchsorted(groups[order], 0) :]
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    for start, stop in pairwise([*starts.tolist(), len(order)]):
        yield int(groups[order[start]]), _compact_index(order[start:stop]), _compact_index(units[order[start:stop]])


def _compact_index(values: Ints) -> Index:
    first, last = int(values[0]), int(values[-1])
    if last - first == len(values) - 1 and bool((values[1:] > values[:-1]).all()):
        return range(first, last + 1)
    return torch.from_numpy(values.copy())  # type: ignore[return-value]


def _names_and_kinds(labels: Labels, root: Tensor, group_of: Tensor, n_groups: int) -> tuple[list[str], list[str]]:
    names: list[str] = [""] * n_groups
    kinds: list[str] = [""] * n_groups
    makers = [0] * n_groups
    taken: set[str] = set()
    for producer in labels.producers.values():
        for group in torch.unique(group_of[root[labels.axes[producer.axis]]]).tolist():
            if group == NO_UNIT:
                continue
            makers[group] += 1
            if not names[group]:
                names[group] = take_free_name(producer.module or producer.axis[0], taken)
                kinds[group] = producer.kind
            elif producer.kind == "conv-groups":
                kinds[group] = producer.kind
    normalised = _groups_with(labels, root, group_of, n_groups, labels.normalised)
    added = _groups_with(labels, root, group_of, n_groups, labels.added)
    for group in range(n_groups):
        if normalised[group] and added[group] and makers[group] > 1:
            kinds[group] = "stream"  # a residual stream: a sum of several layers that a norm averages over
    return names, kinds


def take_free_name(name: str, taken: set[str]) -> str:
    """Return the name, or the first of name#2, name#3, ... that is not among ``taken``, and add it to ``taken``."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}#{number}"
    taken.add(free)
    return free


def _keep_blocks_equal(
    groups: list[Group], units: Tensor, group_of: Tensor, position: Tensor, blocks: int, reason: str
) -> None:
    """Make all normalisation groups keep equally many channels. Lock groups that cannot ensure this."""
    owners = torch.unique(group_of[units]).tolist()
    if owners == [NO_UNIT]:
        return
    if len(owners) == 1 and _apply_blocks(groups, owners[0], position[units], blocks):
        return
    for owner in owners:
        if owner != NO_UNIT and groups[owner].locked is None:
            groups[owner] = replace(groups[owner], locked=reason)


def _apply_blocks(groups: list[Group], owner: int, positions: Tensor, blocks: int) -> bool:
    group = groups[owner]
    table = torch.zeros(blocks, group.n_units, dtype=torch.int64, device="cpu")
    block = torch.arange(len(positions), device="cpu") // (len(positions) // blocks)
    table.index_put_((block, positions), torch.ones_like(positions), accumulate=True)
    if bool((table == table[0]).all()):
        return True  # every unit has equally many channels in every block
    # Blocks within which all units lie in the same normalisation groups, equally often.
    starts = (table[:, 1:] != table[:, :-1]).any(0).nonzero().flatten() + 1
    size = gcd(group.n_units // group.blocks, *starts.tolist())
    fine = group.n_units // size
    if size == 1 and group.n_units > max(blocks, group.blocks):
        return False
    full = f"each of its units fills one of {fine} normalisation groups" if size == 1 else None
    groups[owner] = replace(group, blocks=fine, min_units=max(group.min_units, fine), locked=group.locked or full)
    return True
