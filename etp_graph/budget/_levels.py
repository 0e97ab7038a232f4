"""Levels of a plan under a budget: the smallest sets of units that can be removed together, and their order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from etp_graph.plan import CostModel, Group, Ints, Plan

from ._budget import Budget
from ._uniform import uniform_classes


class LevelCosts:
    """Compute the cost after removal of the first ``k[c]`` *levels* (disjoint sets of units) of each column c.

    One call evaluates many ``k``.

    Args:
        model: the cost model.
        column: the column of each unit, int64 [n_units]; -1 for a unit that is never removed.
        level: the level of each unit in its column, int64 [n_units].
        n_levels: the number of levels of each column, int64 [n_columns].
    """

    def __init__(self, model: CostModel, *, column: Ints, level: Ints, n_levels: Ints) -> None:
        self._model = model
        self._mixed: list[tuple[int, list[tuple[Ints, Ints]]]] = []
        column, level = np.append(column, -1), np.append(level, 0)
        tables: list[Ints] = []
        entries: list[tuple[int, int]] = []
        for dim, layers in enumerate(model.maps):
            if len(layers) > 1:  # a position stays only if all its units stay, so the kept size is no sum over columns
                self._mixed.append((dim, [_steps(column[layer], level[layer]) for layer in layers]))
                continue
            owner, height = column[layers[0]], level[layers[0]]
            for c in np.unique(owner[owner >= 0]).tolist():
                removed = np.bincount(height[owner == c], minlength=int(n_levels[c]))
                tables.append(np.concatenate([[0], removed.cumsum()]))
                entries.append((dim, c))
        self._tables: Ints = np.concatenate(tables) if tables else np.zeros(0, dtype=np.int64)
        self._offsets: Ints = np.cumsum([0, *map(len, tables)], dtype=np.int64)[:-1]
        self._columns: Ints = np.array([c for _, c in entries], dtype=np.int64)
        self._dims, self._starts = np.unique(np.array([d for d, _ in entries], dtype=np.int64), return_index=True)

    def __call__(self, k: Ints) -> dict[str, Ints]:
        """Return the amount of each quantity, [n], at n points ``k`` int64 [n, n_columns]."""
        counts = np.repeat(self._model.sizes[None], len(k), axis=0)
        if len(self._dims):
            removed = self._tables[self._offsets + k[:, self._columns]]
            counts[:, self._dims] -= np.add.reduceat(removed, self._starts, axis=1)
        for dim, layers in self._mixed:
            counts[:, dim] = np.logical_and.reduce([k[:, c] <= height for c, height in layers]).sum(1)
        return self._model.totals(counts)


def _steps(column: Ints, level: Ints) -> tuple[Ints, Ints]:
    """Return column and level of each position. A position that is never removed gets a level above all others."""
    fixed = column < 0
    return np.where(fixed, 0, column), np.where(fixed, np.iinfo(np.int64).max, level)


Floats = npt.NDArray[np.float64]

ROOM = 4
"""Groups are rounded to the multiple that kernels prefer only if they have at least this many times as many units."""


def ranked_quantity(budget: Budget) -> str:
    """Return the name of the quantity that scores are divided by, if the budget's rank divides them."""
    return "macs" if budget.rank == "score_per_mac" else budget.counted


def _ranks(costs: CostModel, scores: Floats, budget: Budget) -> Floats:
    """Return the rank values that are compared across groups, float64 [n_units]; see ``rank`` of the budget."""
    if budget.rank in (None, "score"):
        return scores
    saved = np.maximum(costs.marginal(ranked_quantity(budget)).numpy(), 1.0)
    return np.asarray(scores / (saved if budget.rank == "score_per_mac" else np.sqrt(saved)))


def _multiple(group: Group, budget: Budget, liked: int) -> int:
    """Return the number that the kept units of a group must be a multiple of, by the budget."""
    if isinstance(budget.round_to, Mapping):
        return budget.round_to.get(group.kind, 1)
    if group.kind == "experts":
        return 1
    wanted, width = budget.round_to or liked, _width(group)
    if budget.round_to is None and group.n_units * width < ROOM * liked:
        return 1
    return wanted // math.gcd(wanted, width)


def _width(group: Group) -> int:
    """Return how many channels one unit fills in the narrowest matrix that holds more than one channel of each unit.

    It is 1 except for heads and groups of a convolution. Tables with one value for each head do not count.
    """
    if group.kind not in ("heads", "query_heads", "conv-groups"):
        return 1
    places: dict[tuple[str, int], int] = {}
    for piece in group.slices:
        if not piece.passive:
            places[piece.tensor, piece.axis] = places.get((piece.tensor, piece.axis), 0) + len(piece.index)
    widths = [size // group.n_units for size in places.values()]
    return min((width for width in widths if width > 1), default=1)


def _levels(group: Group, ranks: Floats, budget: Budget, rounded: int) -> Ints:
    """Return the level of every unit, int64 [n_units]. Level 0 is removed first; level -1 is never removed.

    A level holds the lowest-ranked units, equally many of each block, whose removal gives the next allowed number of
    kept units. The first level may therefore be smaller than the others.

    Args:
        group: the group.
        ranks: rank values, float64 [n_units].
        budget: the budget.
        rounded: the number of kept units is a multiple of this.
    """
    width = group.n_units // group.blocks
    step = math.lcm(group.multiple, rounded, group.blocks) // group.blocks
    share = group.n_units - math.floor(budget.max_ratio * group.n_units + 1e-9)
    least_units = budget.min_units if isinstance(budget.min_units, int) else budget.min_units.get(group.kind, 1)
    floor = max(group.min_units, least_units, share)
    least = -(-floor // group.blocks)
    kept = [width, *range((width - 1) // step * step, -(-least // step) * step - 1, -step)]
    stairs = np.full(width, -1, dtype=np.int64)
    stairs[: width - kept[-1]] = np.repeat(np.arange(len(kept) - 1), -np.diff(kept))
    # of equal scores the later unit is removed first, because some forces grow with the index
    order = width - 1 - np.argsort(ranks.reshape(group.blocks, width)[:, ::-1], axis=1, kind="stable")
    level = np.empty((group.blocks, width), dtype=np.int64)
    np.put_along_axis(level, order, np.broadcast_to(stairs, order.shape), axis=1)
    return level.reshape(-1)


def _signature(plan: Plan, group: Group) -> tuple[Any, ...]:
    """Return a key that is equal for groups of any size with the same kinds of units, slices and attributes."""
    slices = Counter((s.tensor.rpartition(".")[2], s.axis, len(plan.tensors[s.tensor])) for s in group.slices)
    attributes = Counter((a.name, a.item) for a in group.attributes)
    return group.kind, group.blocks > 1, frozenset(slices.items()), frozenset(attributes.items())


@dataclass(frozen=True, slots=True)
class Column:
    """Levels of one group, or of groups that keep equally many units, lowest first.

    Attributes:
        group: the group, or the first of them.
        n_units: number of units of all its groups.
        key: mean rank value of each level, ascending, [n_levels].
        end: share of these units removed once the level is removed, [n_levels].
        middle: the same with half of the level removed, [n_levels]. Ordered by it, a level of many units is removed at
            the nearest share.
        dead: True for levels whose scores are all zero, [n_levels].
    """

    group: Group
    n_units: int
    key: Floats
    end: Floats
    middle: Floats
    dead: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, group: Group, level: Ints, ranks: Floats, scores: Floats) -> Column:
        """Make the column from the level, rank value and score of the units of all its groups, each [n_units]."""
        goes = level >= 0
        sizes = np.bincount(level[goes])
        end = sizes.cumsum() / len(level)
        return cls(
            group=group,
            n_units=len(level),
            # the means of sorted values ascend except for rounding
            key=np.maximum.accumulate(np.bincount(level[goes], weights=ranks[goes]) / sizes),
            end=end,
            middle=end - sizes / len(level) / 2,
            dead=np.bincount(level[goes & (scores != 0)], minlength=len(sizes)) == 0,
        )


class Levels:
    """Columns of levels, one for each group that can lose units (or groups that do so together), sorted by name.

    A point ``k``, int64 [n_columns], is the number of levels removed from each column.

    Args:
        costs: cost model of the plan.
        scores: scores, float64 [n_units].
        budget: the budget.
        liked: if the budget does not set ``round_to``, large groups keep a multiple of this.

    Attributes:
        columns: the columns.
        column: column of each unit, int64 [n_units]; -1 for units that are never removed.
        level: level of each unit in its column, int64 [n_units]; -1 for units that are never removed.
        n_levels: number of levels of each column, int64 [n_columns].
        order: column of each level, in the order of removal, int64 [sum of n_levels].
        position: for each column the places of its levels in that order, ascending.
    """

    def __init__(self, costs: CostModel, scores: Floats, budget: Budget, *, liked: int = 1) -> None:
        self.costs, self.budget, self._quantity = costs, budget, budget.quantity
        plan = costs.plan
        ranks = _ranks(costs, scores, budget)
        self.column: Ints = np.full(plan.n_units, -1, dtype=np.int64)
        self.level: Ints = np.full(plan.n_units, -1, dtype=np.int64)
        self.columns: list[Column] = []
        for placed in uniform_classes(plan, budget.uniform):
            units = np.concatenate([np.arange(span.start, span.stop) for _, span in placed])
            rounded = math.lcm(*(_multiple(group, budget, liked) for group, _ in placed))
            level = np.concatenate([_levels(group, ranks[span], budget, rounded) for group, span in placed])
            if (level >= 0).any():
                self.level[units] = level
                self.column[units] = np.where(level >= 0, len(self.columns), -1)
                self.columns.append(Column.of(placed[0][0], level, ranks[units], scores[units]))
        self.n_levels: Ints = np.array([len(column.key) for column in self.columns], dtype=np.int64)
        self._stairs = LevelCosts(costs, column=self.column, level=self.level, n_levels=self.n_levels)
        self._set_order()

    def _set_order(self) -> None:
        """Set the order of removal of all levels: by key, then by place in the group, then by name.

        For the local scope the key is the place in the group; for the isomorphic scope, the rank within the class; for
        the balanced scope, the mean of the place in the group and the rank among all. There, levels at zero and those
        below them come first: they may be far up in a group of which most is at zero, and removing them costs nothing.
        """
        owner = np.repeat(np.arange(len(self.columns)), self.n_levels)
        middle = np.concatenate([np.zeros(0), *(column.middle for column in self.columns)])
        key = np.concatenate([np.zeros(0), *(column.key for column in self.columns)])
        if self.budget.scope == "local":
            key = middle
        elif self.budget.scope == "isomorphic":
            key = self._class_ranks(owner, np.lexsort((owner, middle, key)), self._classes())
        elif self.budget.scope == "balanced":
            one_class = np.zeros(len(self.columns), dtype=np.int64)
            among_all = self._class_ranks(owner, np.lexsort((owner, middle, key)), one_class)
            up_to_dead = [np.maximum.accumulate(column.dead[::-1])[::-1] for column in self.columns]
            dead = np.concatenate([np.zeros(0, dtype=np.bool_), *up_to_dead])
            key = np.where(dead, -1.0, (among_all + middle) / 2)
        order = np.lexsort((owner, middle, key))
        position = np.empty(len(order), dtype=np.int64)
        position[order] = np.arange(len(order))
        self.order: Ints = owner[order]
        self.position = np.split(position, np.cumsum(self.n_levels)[:-1])

    def _classes(self) -> Ints:
        """Return the number of the class of each column: equally built groups are of one class."""
        classes: dict[tuple[Any, ...], int] = {}
        marks = [_signature(self.costs.plan, column.group) for column in self.columns]
        return np.array([classes.setdefault(mark, len(classes)) for mark in marks], dtype=np.int64)

    def _class_ranks(self, owner: Ints, order: Ints, number: Ints) -> Floats:
        """Return for each level the share of the units of its class that rank below its middle (Fang et al. 2024).

        Args:
            owner: column of each level.
            order: the levels, lowest rank value first.
            number: class of each column.
        """
        sizes = np.array([column.n_units for column in self.columns], dtype=np.float64)
        units = np.concatenate([np.zeros(0), *(np.diff(c.end, prepend=0.0) * c.n_units for c in self.columns)])
        key = np.empty(len(owner))
        for c in np.unique(number).tolist():
            mine = order[number[owner[order]] == c]
            key[mine] = (units[mine].cumsum() - units[mine] / 2) / sizes[number == c].sum()
        return key

    def cost(self, k: Ints) -> Any:
        """Return the quantity that the budget limits, [n], at the points ``k`` [n, n_columns]."""
        if not self.columns:
            return np.repeat(self.costs.totals(self.costs.sizes[None])[self._quantity], len(k))
        return self._stairs(k)[self._quantity]

    def one(self, k: Ints) -> int:
        """Return the quantity that the budget limits at one point ``k`` [n_columns]."""
        return int(self.cost(k[None])[0])

    def keep(self, k: Ints) -> npt.NDArray[np.bool_]:
        """Mark the units that stay at the point ``k``, bool [n_units]."""
        return (self.column < 0) | (self.level >= np.append(k, 0)[self.column])
