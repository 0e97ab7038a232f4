"""Kinds, on_request, choosing and restricting by kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from etp_graph.errors import PlanError

from ._groups import Group

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


def chosen_kinds(prune: str | Sequence[str] | None) -> frozenset[str]:
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


def lock_other_kinds(groups: Sequence[Group], kinds: frozenset[str]) -> tuple[Group, ...]:
    """The groups, those of other kinds locked."""
    found = []
    for group in groups:
        reason = None if group.kind in kinds else f"kind {group.kind!r} is not among those to prune"
        if reason and group.kind in ON_REQUEST:
            reason = f"kind {group.kind!r} is pruned on request only: trace(..., prune=[..., {group.kind!r}])"
        found.append(replace(group, locked=group.locked or reason))
    return tuple(found)
