"""Merge the readings of a trace: units along the inner or the outer axis of every view that folds a unit axis.

A projection of width heads x dimensions has two kinds of units. Two trackers therefore follow the forward, one for
each reading. Heads come from the outer reading, all other groups come from the inner one. In grouped-query attention
the query heads lie along two axes, groups x heads of a group. A third tracker follows the second one. A position of a
tensor stays if all of its units stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from etp_graph.graph.rules._terms import cost_terms
from etp_graph.plan import ACTIVATION, Group, Op, as_tensor

from ._grouping import build_groups, take_free_name
from ._labels import REPEATED
from ._tracker import Tracker


@dataclass(frozen=True, slots=True)
class MergedReadings:
    """Groups, cost terms, bytes of the cache and sizes of activation axes, merged from one to three trackers."""

    groups: tuple[Group, ...]
    ops: tuple[Op, ...]
    cache: tuple[Op, ...]
    activations: dict[str, int]


def merge_readings(trackers: Sequence[Tracker], n_ops: int) -> MergedReadings:
    """Merge the groups and the first ``n_ops`` cost terms of the readings of a forward."""
    ops, sizes, maps = cost_terms(*([*tracker.ops[:n_ops], *tracker.cached] for tracker in trackers))
    for tracker, held in zip(trackers, maps, strict=True):
        for name, layers in held.items():
            for layer, ids in enumerate(layers):
                tracker.labels.count((ACTIVATION, name, layer or None), ids)
    groups = build_groups(trackers[0].labels, trackers[0].bare)
    heads: list[Group] = []
    for outer in trackers[1:2]:
        found = build_groups(outer.labels, outer.bare, facet="outer")
        heads = [group for group in found if group.kind == "heads"]
        groups = _without_duplicates(_with_opened(groups, found), heads)
    for outer in trackers[2:]:
        taken = {group.name for group in groups}
        queries = [
            replace(group, name=take_free_name(f"{group.name}.query_heads", taken))
            for group in build_groups(outer.labels, outer.bare, facet="outer")
            if group.kind == "query_heads" and not (group.locked or "").startswith(REPEATED)
        ]
        groups = (*groups[: len(heads)], *queries, *groups[len(heads) :])
    return MergedReadings(groups, ops[:n_ops], ops[n_ops:], sizes)


def _without_duplicates(groups: Sequence[Group], heads: Sequence[Group]) -> tuple[Group, ...]:
    """Return the groups of heads, then the other groups. Rename the groups of dimensions of these heads."""
    same, counts = {_content(head) for head in heads}, {head.n_units for head in heads}
    places = {(piece.tensor, piece.axis) for head in heads for piece in head.slices}
    taken = {head.name for head in heads}
    found: list[Group] = []
    for group in groups:
        if group.n_units in counts and _content(group) in same:
            continue  # a view whose other axis has a fixed size: both readings see the heads
        held = any((piece.tensor, piece.axis) in places for piece in group.slices)
        if not group.folded and group.slices and all((s.tensor, s.axis) in places for s in group.slices):
            continue  # one value per head (a table of position biases), which is in a group of heads
        dims = held and group.folded
        name = take_free_name(f"{group.name}.dims" if dims else group.name, taken)
        found.append(replace(group, kind="head_dims" if dims else group.kind, name=name))
    return (*heads, *found)


def _with_opened(groups: Sequence[Group], outer: Sequence[Group]) -> Sequence[Group]:
    """Return the groups, with those of the outer reading for positions where they are open and the inner ones locked.

    Of units along two axes of one tensor a reading keeps those along one axis, and locks the others (channels and
    states of a state-space model). A group is open only if a reading kept its units everywhere. Groups whose axis a
    view folds are those of :func:`_without_duplicates`.
    """
    inner_at, outer_at = _by_place(groups), _by_place(outer)
    instead: dict[int, list[Group]] = {}
    gone: set[int] = set()
    for number, group in enumerate(outer):
        if group.locked is not None or group.folded or group.kind == "heads":
            continue
        mine, theirs = {number}, _met(group, inner_at)
        if not theirs or theirs & gone or any(groups[n].locked is None for n in theirs):
            continue
        size = 0
        while size != len(mine) + len(theirs):  # all groups of both readings that share positions with one of these
            size = len(mine) + len(theirs)
            mine |= {n for met in theirs for n in _met(groups[met], outer_at)}
            theirs |= {n for met in mine for n in _met(outer[met], inner_at)}
        better = all(groups[n].locked is not None for n in theirs) and not theirs & gone
        if better and not any(outer[n].folded or outer[n].kind == "heads" for n in mine):
            instead[min(theirs)] = [outer[n] for n in sorted(mine)]
            gone |= theirs
    taken = {group.name for number, group in enumerate(groups) if number not in gone}
    found: list[Group] = []
    for number, group in enumerate(groups):
        found += [replace(new, name=take_free_name(new.name, taken)) for new in instead.get(number, [])]
        found += [] if number in gone else [group]
    return found


def _by_place(groups: Sequence[Group]) -> dict[tuple[str, int], list[tuple[int, set[int]]]]:
    """Return the groups on each axis of each tensor, by their number, with the positions of their units."""
    found: dict[tuple[str, int], list[tuple[int, set[int]]]] = {}
    for number, group in enumerate(groups):
        for piece in group.slices:
            found.setdefault((piece.tensor, piece.axis), []).append((number, set(as_tensor(piece.index).tolist())))
    return found


def _met(group: Group, at: dict[tuple[str, int], list[tuple[int, set[int]]]]) -> set[int]:
    """Return the numbers of the groups that share a position with this one."""
    return {
        number
        for piece in group.slices
        for number, positions in at.get((piece.tensor, piece.axis), [])
        if not positions.isdisjoint(as_tensor(piece.index).tolist())
    }


def _content(group: Group) -> tuple[object, ...]:
    """Return what tells the units of a group from those of others: their number and their positions."""
    places = (
        (s.tensor, s.axis, as_tensor(s.index).numpy().tobytes(), as_tensor(s.unit).numpy().tobytes())
        for s in group.slices
    )
    return group.n_units, frozenset(places)
