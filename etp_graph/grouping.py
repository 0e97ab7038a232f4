"""From resolved labels to groups: units with the same signature form one group."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .labels import Labels
from .operators import Facet, compact, varying
from .plan import Attribute, Group, Index, Slice


@dataclass(slots=True)
class _Place:
    """One axis of a tensor, or one module attribute, with the unit (representative label, 0: none) of each position."""

    key: tuple[str, int] | tuple[str, str, int | None]
    units: Tensor
    passive: bool = False


def build_groups(labels: Labels, bare: dict[str, Tensor], facet: Facet = "inner") -> tuple[Group, ...]:
    """The groups of a trace, in the order of their first producers.

    Units belong to one group if they live in the same places, equally often, and share their fate (locked or not):
    ranking them against each other is then fair, and every group is a block of equal columns.
    """
    root, locked = labels.resolve()
    produced = torch.zeros(len(root), dtype=torch.bool, device="cpu")
    for producer in labels.producers.values():
        produced[root[labels.axes[producer.axis]]] = True
    produced[0] = False
    places = list(_places(labels, bare, root, produced, locked))
    units, group_of, position, reasons = _partition(root, produced, places, locked)
    n_groups = len(reasons)
    slices: list[list[Slice]] = [[] for _ in range(n_groups)]
    attributes: list[list[Attribute]] = [[] for _ in range(n_groups)]
    for place in places:
        for group, index, unit in _split(place.units, group_of, position):
            if len(place.key) == 2:
                tensor, axis = place.key
                piece = Slice(tensor=tensor, axis=axis, index=index, unit=unit, passive=place.passive)
                slices[group].append(piece)
            else:
                module, name, item = place.key
                attributes[group].append(Attribute(module=module, name=name, item=item, index=index, unit=unit))
    sizes = torch.bincount(group_of[units], minlength=n_groups).tolist() if len(units) else []
    names, kinds = _names(labels, root, group_of, n_groups)
    floors = [2 if n else 1 for n in _with(labels, root, group_of, n_groups, labels.normalised)]
    folded = _with(labels, root, group_of, n_groups, labels.folded)
    if facet == "outer":
        headed = _with(labels, root, group_of, n_groups, labels.headed)
        kinds = ["heads" if f and h else kind for f, h, kind in zip(folded, headed, kinds, strict=True)]
    groups = [
        Group(name=names[g], kind=kinds[g], n_units=sizes[g], slices=tuple(slices[g]),
              attributes=tuple(attributes[g]), min_units=min(floors[g], sizes[g]), locked=reasons[g], folded=folded[g])
        for g in range(n_groups)
    ]  # fmt: skip
    _bound(groups, labels, root, group_of)
    for ids, blocks, where in labels.blocks:
        _constrain(groups, root[ids], group_of, position, blocks, where)
    return tuple(_tied(groups, labels, root, group_of))


def _tied(groups: list[Group], labels: Labels, root: Tensor, group_of: Tensor) -> list[Group]:
    """Runs of units that must stay equally long become one group with a block for each run."""
    gone: set[int] = set()
    for runs in {tuple(int(run[0]) for run in runs): runs for runs in labels.runs}.values():  # one for each call
        held = [sorted({*group_of[root[run]].tolist()}) for run in runs]
        numbers = list(dict.fromkeys(number for owners in held for number in owners if number >= 0))
        if len(numbers) <= 1 and all(len(owners) == 1 for owners in held):
            continue  # one run, or runs that are the same units
        fits = all(
            len(owners) == 1 and owners[0] >= 0 and owners[0] not in gone and groups[owners[0]].n_units == len(run)
            and groups[owners[0]].blocks == groups[owners[0]].multiple == 1
            for owners, run in zip(held, runs, strict=True)
        )  # fmt: skip
        if not fits or len(numbers) != len(runs):
            for number in numbers:
                why = "its units are coupled to others, and each run of the layer must keep equally many"
                groups[number] = replace(groups[number], locked=groups[number].locked or why)
            continue
        groups[numbers[0]] = _joined([groups[number] for number in numbers])
        gone.update(numbers[1:])
    return [group for number, group in enumerate(groups) if number not in gone]


def _joined(runs: list[Group]) -> Group:
    """One group of equally long blocks."""
    size = runs[0].n_units
    slices = [replace(s, unit=_shifted(s.unit, n * size)) for n, run in enumerate(runs) for s in run.slices]
    attributes = [replace(a, unit=_shifted(a.unit, n * size)) for n, run in enumerate(runs) for a in run.attributes]
    locked = next((run.locked for run in runs if run.locked), None)
    least = max(run.min_units for run in runs) * len(runs)
    return replace(
        runs[0], n_units=size * len(runs), slices=tuple(slices), attributes=tuple(attributes), blocks=len(runs),
        min_units=least, locked=locked,
    )  # fmt: skip


def _shifted(units: Index, by: int) -> Index:
    return range(units.start + by, units.stop + by) if isinstance(units, range) else units + by  # type: ignore


def _bound(groups: list[Group], labels: Labels, root: Tensor, group_of: Tensor) -> None:
    """The least number of units that stay, and what their number must be a multiple of."""
    for found, name in ((labels.floors, "min_units"), (labels.multiples, "multiple")):
        for ids, number in found:
            for owner in {g for g in group_of[root[ids]].tolist() if g >= 0}:
                value = max(getattr(groups[owner], name), number)
                groups[owner] = replace(groups[owner], **{name: min(value, groups[owner].n_units)})


def _with(labels: Labels, root: Tensor, group_of: Tensor, n_groups: int, found: list[Tensor]) -> list[bool]:
    """Which groups have a unit among the labels found."""
    flags = torch.zeros(n_groups + 1, dtype=torch.bool, device="cpu")
    flags[group_of[labels.members(root, found)]] = True  # no group is -1, the last entry
    return flags[:n_groups].tolist()


def _places(
    labels: Labels, bare: dict[str, Tensor], root: Tensor, produced: Tensor, locked: dict[int, str]
) -> Iterator[_Place]:
    def units(ids: Tensor) -> Tensor:
        found = root[ids]
        return torch.where(produced[found], found, 0)

    for axis, ids in labels.axes.items():
        yield _Place(axis, units(ids), axis in labels.passive)
    for key, ids in labels.attributes.items():
        yield _Place(key, units(ids))
    for key, ids, dim in labels.guesses:
        small = compact(units(ids))
        if small is not None and varying(small) == [dim] and key not in labels.attributes:
            yield _Place(key, small.flatten())
    for name, ids in bare.items():
        small = compact(_filled(units(ids), root[ids], locked))
        if small is not None:
            yield from _table_places(labels, name, small, ids.numel(), locked)


def _table_places(labels: Labels, name: str, small: Tensor, numel: int, locked: dict[int, str]) -> Iterator[_Place]:
    """The axis of a bare parameter that holds units; locks them where it is none, or is read at fixed positions."""
    dims = varying(small)
    reason = f"meets several axes of the parameter {name}" if len(dims) > 1 or numel > 1 else None
    if len(dims) == 1:
        at = labels.pinned.get((name, dims[0]))
        reason = None if at is None else f"{name} {at}"
        yield _Place((name, dims[0]), small.flatten())
    if reason is not None:
        for unit in small.unique().tolist():
            locked.setdefault(unit, reason)


def _filled(units: Tensor, found: Tensor, locked: dict[int, str]) -> Tensor:
    """Entries of a stored table that no forward read belong to the unit of the entries beside them."""
    if bool((units > 0).all()) or not bool((units > 0).any()):
        return units
    free = (units == 0) & ~torch.isin(found, torch.tensor(list(locked), dtype=torch.int64, device="cpu"))
    for d in range(units.ndim):
        over = [other for other in range(units.ndim) if other != d]
        high = units.amax(over, keepdim=True) if over else units
        if bool((free | (units == high)).all()) and bool((high > 0).all()):
            return high.expand_as(units)
    return units


def _partition(
    root: Tensor, produced: Tensor, places: list[_Place], locked: dict[int, str]
) -> tuple[Tensor, Tensor, Tensor, list[str | None]]:
    """Units, group of each label, position inside the group of each label, reason of each group."""
    signature = torch.zeros(len(root), dtype=torch.int64, device="cpu")
    for place in places:
        if len(place.key) > 2:
            continue  # attributes count units, they do not tell them apart
        digest = hashlib.blake2b(repr(place.key).encode(), digest_size=8).digest()
        code = int.from_bytes(digest, "little", signed=True)
        signature.index_add_(0, place.units, torch.full_like(place.units, code))
    units = torch.unique(root[produced[root]])
    keys: dict[tuple[int, str | None], int] = {}
    group_of = torch.full((len(root),), -1, device="cpu")
    position = torch.zeros(len(root), dtype=torch.int64, device="cpu")
    counts: list[int] = []
    of, at = [], []
    for unit, code in zip(units.tolist(), signature[units].tolist(), strict=True):
        group = keys.setdefault((code, locked.get(unit)), len(keys))
        if group == len(counts):
            counts.append(0)
        of.append(group)
        at.append(counts[group])
        counts[group] += 1
    group_of[units] = torch.tensor(of, dtype=torch.int64, device="cpu")
    position[units] = torch.tensor(at, dtype=torch.int64, device="cpu")
    return units, group_of, position, [reason for _, reason in keys]


def _split(units: Tensor, group_of: Tensor, position: Tensor) -> Iterator[tuple[int, Index, Index]]:
    """For every group on an axis: the positions of its units, ascending, and which units they are."""
    groups = group_of[units].numpy()
    order = np.argsort(groups, kind="stable")
    order = order[np.searchsorted(groups[order], 0) :]
    unit = position[units].numpy()[order]
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    for start, stop in pairwise([*starts.tolist(), len(order)]):
        yield int(groups[order[start]]), _index(order[start:stop]), _index(unit[start:stop])


def _index(values: npt.NDArray[np.int64]) -> Index:
    first, last = int(values[0]), int(values[-1])
    if last - first == len(values) - 1 and bool((values[1:] > values[:-1]).all()):
        return range(first, last + 1)
    return torch.from_numpy(values.copy())  # type: ignore[return-value]


def _names(labels: Labels, root: Tensor, group_of: Tensor, n_groups: int) -> tuple[list[str], list[str]]:
    names: list[str] = [""] * n_groups
    kinds: list[str] = [""] * n_groups
    makers = [0] * n_groups
    taken: dict[str, int] = {}
    for producer in labels.producers.values():
        for group in torch.unique(group_of[root[labels.axes[producer.axis]]]).tolist():
            if group < 0:
                continue
            makers[group] += 1
            if not names[group]:
                base = producer.module or producer.axis[0]
                taken[base] = taken.get(base, 0) + 1
                names[group] = base if taken[base] == 1 else f"{base}#{taken[base]}"
                kinds[group] = producer.kind
            elif producer.kind == "conv-groups":
                kinds[group] = producer.kind
    normalised = _with(labels, root, group_of, n_groups, labels.normalised)
    for group in range(n_groups):
        if normalised[group] and makers[group] > 1:
            kinds[group] = "stream"  # a residual stream: sums of several layers, averaged over by a norm
    return names, kinds


def _constrain(groups: list[Group], units: Tensor, group_of: Tensor, position: Tensor, blocks: int, where: str) -> None:
    """Every normalisation group of ``where`` must keep equally many channels; lock what cannot promise it."""
    owners = torch.unique(group_of[units]).tolist()
    if owners == [-1]:
        return
    if len(owners) == 1 and _apply_blocks(groups, owners[0], position[units], blocks):
        return
    for owner in owners:
        if owner >= 0 and groups[owner].locked is None:
            reason = f"its channels do not fill the {blocks} normalisation groups of {where} evenly"
            groups[owner] = replace(groups[owner], locked=reason)


def _apply_blocks(groups: list[Group], owner: int, positions: Tensor, blocks: int) -> bool:
    group = groups[owner]
    table = torch.zeros(blocks, group.n_units, dtype=torch.int64, device="cpu")
    block = torch.arange(len(positions), device="cpu") // (len(positions) // blocks)
    table.index_put_((block, positions), torch.ones_like(positions), accumulate=True)
    if bool((table == table[0]).all()):
        return True  # every unit has an equal share in every block
    if group.n_units % blocks:
        return False
    expected = torch.arange(group.n_units, device="cpu") // (group.n_units // blocks)
    alone = (table > 0).sum(0) == 1
    if (
        not bool(alone.all())
        or not torch.equal(table.argmax(0), expected)
        or int(table.max()) != int(table.sum(0).min())
    ):
        return False
    fine, coarse = max(blocks, group.blocks), min(blocks, group.blocks)
    if fine % coarse:
        return False
    full = f"each of its units fills one of {fine} normalisation groups" if fine == group.n_units else None
    groups[owner] = replace(group, blocks=fine, min_units=max(group.min_units, fine), locked=group.locked or full)
    return True
