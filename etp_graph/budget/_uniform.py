"""Groups that keep the same number of units, because one value of a configuration describes them all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from etp_graph._config import require
from etp_graph.errors import BudgetError
from etp_graph.plan import KINDS, Group, Plan

Uniform = bool | str | Sequence[str]
"""True for all kinds, False for none, or the kind or kinds of units whose groups keep equally many."""

Placed = tuple[Group, slice]
"""A group, and its place in a flat vector over all units."""


def read_uniform(value: Uniform) -> bool | tuple[str, ...]:
    """Return ``uniform`` of a budget as a bool or a tuple of kinds. Raises :class:`BudgetError` for anything else."""
    if isinstance(value, bool):
        return value
    kinds = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (tuple, list)) else ()
    unknown = [kind for kind in kinds if kind not in KINDS]
    require(
        bool(kinds) and not unknown,
        f"uniform={value!r} names no kinds of units: give True, or some of {', '.join(KINDS)}.",
        BudgetError,
    )
    return kinds


def uniform_classes(plan: Plan, uniform: Uniform) -> Iterator[list[Placed]]:
    """Yield the groups that lose units together, sorted by name: one alone, or all of a kind with equally many units.

    A model that is built from a configuration has equally many units wherever one value describes them, so no group of
    another size belongs to a class. The groups of a class get its strictest constraints, so that they can keep the same
    numbers. A class with a locked group that is built like the others keeps all units, and is not yielded.
    """
    uniform = read_uniform(uniform)
    classes: dict[tuple[str, int] | str, list[Placed]] = {}
    # sorted by name, so that the result for equal keys does not depend on the order of the groups
    for group, span in sorted(plan.spans(), key=lambda placed: placed[0].name):
        tied = uniform if isinstance(uniform, bool) else group.kind in uniform
        classes.setdefault((group.kind, group.n_units) if tied else group.name, []).append((group, span))
    for placed in classes.values():
        free = [(group, span) for group, span in placed if group.locked is None]
        if free and not _held_back(placed):
            yield _with_common_constraints(free)


def _held_back(placed: list[Placed]) -> bool:
    """Return whether a locked group of the class cuts the same attributes of modules as a free one."""
    free = {_places(group) for group, _ in placed if group.locked is None}
    return any(group.locked is not None and _places(group) in free for group, _ in placed)


def _places(group: Group) -> frozenset[tuple[str, str]]:
    """Return the last names of the modules with the attributes of them that count the units of a group."""
    return frozenset((a.module.rpartition(".")[2], a.name) for a in group.attributes if not a.module.startswith("~"))


def _with_common_constraints(placed: list[Placed]) -> list[Placed]:
    if len(placed) == 1:
        return placed
    groups = [group for group, _ in placed]
    multiple = math.lcm(*(group.multiple for group in groups), *(group.blocks for group in groups))
    least = max(group.min_units for group in groups)
    return [(replace(group, multiple=multiple, min_units=least), span) for group, span in placed]
