"""The two facets of a trace put together: units as the inner and as the outer axis of every view that folds them.

A projection of width heads x dimensions has two kinds of units. One forward is followed twice, each time with
another answer to "which of the folded axes holds the units"; heads are taken from the second, everything else from the
first. A position of a tensor stays if both of its units stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .errors import PlanError
from .grouping import build_groups
from .plan import ACTIVATION, Group, Op
from .products import terms
from .tracker import Tracker

KINDS = (
    "channels", "conv-groups", "neurons", "heads", "head_dims", "features", "stream", "hidden", "projections",
    "experts",
)  # fmt: skip
"""Every kind of unit that a plan can have."""

ON_REQUEST = frozenset(("stream", "head_dims", "experts"))
"""Kinds that are pruned only if asked for.

Units of the stream are averaged over by every layer norm: removing even units that are zero changes its statistics.
Dimensions of a head leave every head narrower, where a head fewer is one matrix product fewer. An expert whose weights
are zero is still chosen by its router: removing it sends its tokens elsewhere.
"""


@dataclass(frozen=True, slots=True)
class Facets:
    """What one or two trackers found, merged."""

    groups: tuple[Group, ...]
    ops: tuple[Op, ...]
    activations: dict[str, int]


def merge(trackers: Sequence[Tracker], n_ops: int) -> Facets:
    """Groups and cost terms (the first ``n_ops``) of the one or two facets of a forward."""
    ops, sizes, maps = terms(*(tracker.ops[:n_ops] for tracker in trackers))
    for tracker, held in zip(trackers, maps, strict=True):
        for name, layers in held.items():
            for layer, ids in enumerate(layers):
                tracker.labels.count((ACTIVATION, name, layer or None), ids)
    groups = build_groups(trackers[0].labels, trackers[0].bare)
    for outer in trackers[1:]:
        heads = [group for group in build_groups(outer.labels, outer.bare, facet="outer") if group.kind == "heads"]
        groups = _together(groups, heads)
    return Facets(groups, ops, sizes)


def _together(groups: Sequence[Group], heads: Sequence[Group]) -> tuple[Group, ...]:
    """The heads, each before the dimensions of its heads."""
    places = {(piece.tensor, piece.axis) for head in heads for piece in head.slices}
    taken = {head.name for head in heads}
    found: list[Group] = []
    for group in groups:
        held = any((piece.tensor, piece.axis) in places for piece in group.slices)
        if not group.folded and group.slices and all((s.tensor, s.axis) in places for s in group.slices):
            continue  # one value for each head (a table of position biases), which the other facet knows better
        dims = held and group.folded
        found.append(replace(group, kind="head_dims", name=_free(f"{group.name}.dims", taken)) if dims else group)
        taken.add(found[-1].name)
    return (*heads, *found)


def _free(name: str, taken: set[str]) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}#{number}"
    return free


def chosen(prune: str | Sequence[str] | None) -> frozenset[str]:
    """The kinds of units that ``prune`` asks for; ``None``: all but those on request, ``"all"``: all."""
    if prune is None:
        return frozenset(KINDS) - ON_REQUEST
    kinds = {prune} if isinstance(prune, str) else set(prune)
    unknown = sorted(kinds - set(KINDS) - {"all"})
    if unknown or not kinds:
        raise PlanError(f"prune={prune!r} names no kind of unit; the kinds are {', '.join(KINDS)}, and 'all'.")
    if "all" in kinds:
        return frozenset(KINDS)
    return frozenset(kinds | ({"conv-groups"} if "channels" in kinds else set()))


def restrict(groups: Sequence[Group], kinds: frozenset[str]) -> tuple[Group, ...]:
    """The groups, those of other kinds locked."""
    found = []
    for group in groups:
        reason = None if group.kind in kinds else f"kind {group.kind!r} is not among those to prune"
        if reason and group.kind in ON_REQUEST:
            reason = f"kind {group.kind!r} is pruned on request only: trace(..., prune=[..., {group.kind!r}])"
        found.append(replace(group, locked=group.locked or reason))
    return tuple(found)
