"""The levels of a plan under a budget: the smallest steps of removal in every group, and the order among them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from etp_graph.plan import CostModel, Group, Ints, Plan

from ._budget import Budget


class LevelCosts:
    """The cost after removing the first ``k[c]`` *levels* (disjoint sets of units) of each column c, for many k.

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
            if len(layers) > 1:  # a position stays only if all of its units stay: not a sum over columns
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

    def __call__(self, k: Ints) -> Ints:
        """MACs and parameters, [n, 2], for n points of the staircase ``k`` int64 [n, n_columns]."""
        counts = np.repeat(self._model.sizes[None], len(k), axis=0)
        if len(self._dims):
            removed = self._tables[self._offsets + k[:, self._columns]]
            counts[:, self._dims] -= np.add.reduceat(removed, self._starts, axis=1)
        for dim, layers in self._mixed:
            counts[:, dim] = np.logical_and.reduce([k[:, c] <= height for c, height in layers]).sum(1)
        return self._model.totals(counts)


def _steps(column: Ints, level: Ints) -> tuple[Ints, Ints]:
    """Column and level of each position; a position that never goes has a level above all."""
    fixed = column < 0
    return np.where(fixed, 0, column), np.where(fixed, np.iinfo(np.int64).max, level)


Floats = npt.NDArray[np.float64]

ROOM = 4
"""A group is rounded to what the kernels like only if it has at least so many times as many units."""


def _ranks(costs: CostModel, scores: Floats, budget: Budget) -> Floats:
    """What is compared across groups, float64 [n_units]: the scores over what each unit alone costs, as asked for."""
    if budget.rank in (None, "score"):
        return scores
    macs, params = (np.maximum(saved.numpy(), 1.0) for saved in costs.marginal())
    if budget.rank == "score_per_mac":
        return np.asarray(scores / macs)
    return np.asarray(scores / np.sqrt(params if budget.quantity == "params" else macs))


def _levels(group: Group, ranks: Floats, budget: Budget, liked: int) -> Ints:
    """The level of every unit, int64 [n_units]: level 0 goes first; -1 never goes.

    One step down removes the lowest unit of every block; a level is as many steps as it takes to reach the next
    admissible number of kept units, so the first one may be smaller than the others.
    """
    width = group.n_units // group.blocks
    rounded = liked if budget.round_to is None and group.n_units >= ROOM * liked else budget.round_to or 1
    step = math.lcm(group.multiple, rounded, group.blocks) // group.blocks
    share = group.n_units - math.floor(budget.max_ratio * group.n_units + 1e-9)
    floor = max(group.min_units, budget.min_units, share)
    least = -(-floor // group.blocks)
    kept = [width, *range((width - 1) // step * step, -(-least // step) * step - 1, -step)]
    stairs = np.full(width, -1, dtype=np.int64)
    stairs[: width - kept[-1]] = np.repeat(np.arange(len(kept) - 1), -np.diff(kept))
    # of equal scores the later unit goes first: where forces grow with the index, it was pushed harder
    order = width - 1 - np.argsort(ranks.reshape(group.blocks, width)[:, ::-1], axis=1, kind="stable")
    level = np.empty((group.blocks, width), dtype=np.int64)
    np.put_along_axis(level, order, np.broadcast_to(stairs, order.shape), axis=1)
    return level.reshape(-1)


def _signature(plan: Plan, group: Group) -> tuple[Any, ...]:
    """Equal for groups that are built alike, whatever their sizes: the same slices and attributes of the same kinds."""
    slices = Counter((s.tensor.rpartition(".")[2], s.axis, len(plan.tensors[s.tensor])) for s in group.slices)
    attributes = Counter((a.name, a.item) for a in group.attributes)
    return group.kind, group.blocks > 1, frozenset(slices.items()), frozenset(attributes.items())


@dataclass(frozen=True, slots=True)
class Column:
    """The levels of one group, lowest first. All arrays are [n_levels].

    ``key``: mean rank value of a level, ascending. ``end``: share of the group's units gone after the level.
    ``middle``: the same half-way, so that a level of many units is removed at the nearest share. ``dead``: only zeros.
    """

    group: Group
    key: Floats
    end: Floats
    middle: Floats
    dead: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, group: Group, level: Ints, ranks: Floats, scores: Floats) -> Column:
        """From the level, rank value and score of each of the group's units, all [n_units of the group]."""
        goes = level >= 0
        sizes = np.bincount(level[goes])
        end = sizes.cumsum() / group.n_units
        return cls(
            group=group,
            # the means of sorted scores ascend, but for rounding
            key=np.maximum.accumulate(np.bincount(level[goes], weights=ranks[goes]) / sizes),
            end=end,
            middle=end - sizes / group.n_units / 2,
            dead=np.bincount(level[goes & (scores != 0)], minlength=len(sizes)) == 0,
        )


class Levels:
    """Columns of levels, one for each group that can lose any, in the order of the groups' names.

    A point ``k`` int64 [n_columns] says how many levels of each column are gone.

    Args:
        costs: what a selection costs.
        scores: float64 [n_units].
        budget: the rules.
        liked: where the budget leaves ``round_to`` open, large groups keep a multiple of this.

    Attributes:
        columns: the columns.
        column: the column of every unit, int64 [n_units]; -1 for a unit that never goes.
        level: the level of every unit in its column, int64 [n_units]; -1 for a unit that never goes.
        n_levels: number of levels of each column, int64 [n_columns].
        order: the column of each level, in the order of removal, int64 [sum of n_levels].
        position: for each column the places of its levels in that order, ascending.
    """

    def __init__(self, costs: CostModel, scores: Floats, budget: Budget, *, liked: int = 1) -> None:
        self.costs, self.budget = costs, budget
        plan = costs.plan
        ranks = _ranks(costs, scores, budget)
        self.column: Ints = np.full(plan.n_units, -1, dtype=np.int64)
        self.level: Ints = np.full(plan.n_units, -1, dtype=np.int64)
        self.columns: list[Column] = []
        # in the order of the names, so that ties do not depend on the order of the groups
        for group, span in sorted(plan.spans(), key=lambda pair: pair[0].name):
            if group.locked is not None:
                continue
            level = _levels(group, ranks[span], budget, liked)
            if (level >= 0).any():
                self.level[span] = level
                self.column[span] = np.where(level >= 0, len(self.columns), -1)
                self.columns.append(Column.of(group, level, ranks[span], scores[span]))
        self.n_levels: Ints = np.array([len(column.key) for column in self.columns], dtype=np.int64)
        self._stairs = LevelCosts(costs, column=self.column, level=self.level, n_levels=self.n_levels)
        self._set_order()

    def _set_order(self) -> None:
        """Sort all levels into the order of removal: by key, then by place in the group, then by name."""
        owner = np.repeat(np.arange(len(self.columns)), self.n_levels)
        middle = np.concatenate([np.zeros(0), *(column.middle for column in self.columns)])
        key = np.concatenate([np.zeros(0), *(column.key for column in self.columns)])
        if self.budget.scope == "local":
            key = middle
        elif self.budget.scope == "isomorphic":
            key = self._class_ranks(owner, np.lexsort((owner, middle, key)))
        order = np.lexsort((owner, middle, key))
        position = np.empty(len(order), dtype=np.int64)
        position[order] = np.arange(len(order))
        self.order: Ints = owner[order]
        self.position = np.split(position, np.cumsum(self.n_levels)[:-1])

    def _class_ranks(self, owner: Ints, order: Ints) -> Floats:
        """For each level the share of its class's units that ranks below its middle (Fang et al. 2024)."""
        classes: dict[tuple[Any, ...], int] = {}
        marks = [_signature(self.costs.plan, column.group) for column in self.columns]
        number = np.array([classes.setdefault(mark, len(classes)) for mark in marks], dtype=np.int64)
        sizes = np.array([column.group.n_units for column in self.columns], dtype=np.float64)
        units = np.concatenate([np.zeros(0), *(np.diff(c.end, prepend=0.0) * c.group.n_units for c in self.columns)])
        key = np.empty(len(owner))
        for c in range(len(classes)):
            mine = order[number[owner[order]] == c]
            key[mine] = (units[mine].cumsum() - units[mine] / 2) / sizes[number == c].sum()
        return key

    def cost(self, k: Ints) -> Any:
        """What the budget counts, [n], at the points ``k`` [n, n_columns]."""
        found = self._stairs(k) if self.columns else np.repeat(self.costs.totals(self.costs.sizes[None]), len(k), 0)
        return found[:, ("macs", "params", "latency").index(self.budget.quantity)]

    def one(self, k: Ints) -> int:
        """What the budget counts at one point ``k`` [n_columns]."""
        return int(self.cost(k[None])[0])

    def keep(self, k: Ints) -> npt.NDArray[np.bool_]:
        """Which units stay at the point ``k``, bool [n_units]."""
        return (self.column < 0) | (self.level >= np.append(k, 0)[self.column])
