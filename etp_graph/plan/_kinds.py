"""Kinds, on_request, choosing and restricting by kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from etp_graph.errors import PlanError

from ._groups import Group

KINDS = (
    "channels", "conv-groups", "neurons", "heads", "query_heads", "head_dims", "features", "stream", "hidden",
    "projections", "experts",
)  # fmt: skip
"""Every kind of unit that a plan can have."""

ON_REQUEST = frozenset(("stream", "query_heads", "head_dims", "experts"))
"""Kinds that are pruned only on request.

Every layer norm averages over the units of the stream, so removing a unit changes its statistics even if the unit is
zero. A query head of every group of grouped-query attention lies in the same rows as the heads, and the cache of keys
and values does not shrink with it. Removing dimensions only makes every head narrower, while removing a head saves
whole matrix products. A router still chooses an expert whose weights are zero, so removing the expert sends its tokens
to other experts.
"""


def chosen_kinds(prune: str | Sequence[str] | None) -> frozenset[str]:
    """Return the kinds of units that ``prune`` names.

    ``None`` means all kinds that are not in :data:`ON_REQUEST`. Channels include groups of grouped convolutions.
    """
    if prune is None:
        return frozenset(KINDS) - ON_REQUEST
    kinds = {prune} if isinstance(prune, str) else set(prune)
    unknown = sorted(kinds - set(KINDS) - {"all"})
    if unknown or not kinds:
        hint = " Whole blocks are found and removed by etp_graph.depth." if "blocks" in unknown else ""
        raise PlanError(f"prune={prune!r} names no kind of unit; the kinds are {', '.join(KINDS)}, and 'all'.{hint}")
    if "all" in kinds:
        return frozenset(KINDS)
    return frozenset(kinds | ({"conv-groups"} if "channels" in kinds else set()))


def lock_other_kinds(groups: Sequence[Group], kinds: frozenset[str]) -> tuple[Group, ...]:
    """Lock the groups whose kind is not among ``kinds``."""
    found = []
    for group in groups:
        reason = None if group.kind in kinds else f"kind {group.kind!r} is not among those to prune"
        if reason and group.kind in ON_REQUEST:
            reason = f"kind {group.kind!r} is pruned on request only: trace(..., prune=[..., {group.kind!r}])"
        found.append(replace(group, locked=group.locked or reason))
    return tuple(found)
