"""Class _search: the point closest below the target."""

from __future__ import annotations

import heapq
import itertools
import math

import numpy as np

from etp_graph.plan import Ints

from ._levels import Levels

TOLERANCE = 0.99
"""Share of the target: the search may end at a selection that costs at least this much of it."""

_MAX_STATES = 1 << 14

_MAX_MOVES = 256


class LevelSearch:
    """Search for the point with the highest cost that fits the target, close to the order of removal."""

    def __init__(self, levels: Levels, target: int) -> None:
        self.levels, self.target = levels, target
        self.n_levels, self.position = levels.n_levels, levels.position
        self.lost = [np.append(0, position.cumsum()) for position in levels.position]

    def close_enough(self, cost: int) -> bool:
        """Return True if the cost is so close to the target that the search may end."""
        return cost >= TOLERANCE * self.target

    def solve(self) -> Ints:
        """Return how many levels of each column to remove, int64 [n_columns]."""
        k = self._fill(self._bisect(self.levels.order), spare_dead=True)
        if not self.close_enough(self.levels.one(k)):
            k = self._fill(k, spare_dead=False)
        # a level of a uniform budget spans many groups: exchanging one to come closer could cost far more score
        if self.levels.budget.uniform or self.close_enough(self.levels.one(k)):
            return k
        if math.prod((self.n_levels + 1).tolist()) <= _MAX_STATES:
            return self._enumerate()
        return self._exchange(k)

    def first_point_towards(self, end: Ints) -> Ints:
        """Remove the levels of ``end`` in order until the target is met. Return that point, int64 [n_columns]."""
        places = [position[:count] for position, count in zip(self.position, end, strict=True)]
        return self._bisect(self.levels.order[np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *places]))])

    def _bisect(self, order: Ints) -> Ints:
        """Remove the levels ``order`` (their columns) from the first on, as few as meet the target; return the point.

        If all of them are too few, all are removed.
        """
        low, high = -1, len(order)
        while high - low > 1:
            middle = (low + high) // 2
            if self.levels.one(self._after(order[:middle])) <= self.target:
                high = middle
            else:
                low = middle
        return self._after(order[:high])

    def _after(self, gone: Ints) -> Ints:
        """Return the point at which these levels (given by their columns) are removed, int64 [n_columns]."""
        return np.bincount(gone, minlength=len(self.n_levels))

    def _fill(self, k: Ints, *, spare_dead: bool) -> Ints:
        """Give back every level that fits the target, the last removed first.

        With ``spare_dead`` a dead level (all scores zero) stays removed, and so do the lower levels of its column.
        A level that does not fit is not tried again, because the cost only rises as other levels are given back.
        """
        k = k.copy()
        heap = [(-int(self.position[c][k[c] - 1]), c) for c in np.flatnonzero(k).tolist()]
        heapq.heapify(heap)
        while heap:
            c = heapq.heappop(heap)[1]
            if spare_dead and self.levels.columns[c].dead[k[c] - 1]:
                continue
            k[c] -= 1
            if self.levels.one(k) > self.target:
                k[c] += 1
            elif k[c]:
                heapq.heappush(heap, (-int(self.position[c][k[c] - 1]), c))
        return k

    def _enumerate(self) -> Ints:
        """Pick the best of all points; see :meth:`_pick`."""
        points = np.indices(tuple(self.n_levels + 1)).reshape(len(self.n_levels), -1).T
        costs = self.levels.cost(points)
        fits = costs <= self.target
        return self._pick(points, int(costs[fits].max()) - 1)  # type: ignore[return-value]  # one of them fits

    def _exchange(self, k: Ints) -> Ints:
        """Exchange levels between two columns while the cost comes closer to the target.

        One level is exchanged for one; if no such exchange helps, any numbers of levels.
        """
        for _ in range(_MAX_MOVES):
            cost = self.levels.one(k)
            if self.close_enough(cost):
                break
            found = self._swap(k, cost)
            if found is None:
                found = self._trade(k, cost)
            if found is None:
                break
            k = self._fill(found, spare_dead=False)
        return k

    def _swap(self, k: Ints, best: int) -> Ints | None:
        """Remove one more level of a column and give back one of another; pick the best point above ``best``."""
        eye = np.eye(len(k), dtype=np.int64)
        back = np.flatnonzero(k).tolist()
        more = np.flatnonzero(k < self.n_levels).tolist()
        points = [k + eye[c] - eye[b] for c in more for b in back if b != c]
        return self._pick(np.array(points), best) if points else None

    def _pick(self, points: Ints, best: int) -> Ints | None:
        """Pick the point with the smallest loss among those close to the target, or else the closest one that fits.

        ``None`` if no point that fits costs more than ``best``.
        """
        costs = np.where((found := self.levels.cost(points)) <= self.target, found, -1)
        if costs.max() <= best:
            return None
        candidates = points[costs >= min(TOLERANCE * self.target, costs.max())]
        return np.asarray(candidates[self._loss(candidates).argmin()])

    def _loss(self, points: Ints) -> Ints:
        """Sum the places, in the order of removal, of the levels removed at the points [n, n_columns]: int64 [n]."""
        return np.asarray(sum(lost[points[:, c]] for c, lost in enumerate(self.lost)))

    def _trade(self, k: Ints, best: int) -> Ints | None:
        """Pick the best point above the cost ``best`` that differs from ``k`` in at most two columns."""
        found: Ints | None = None
        tried = 0
        for a, b in itertools.permutations(range(len(k)), 2):
            if self.close_enough(best) and tried > _MAX_STATES:
                break
            if self.n_levels[a] > self.n_levels[b]:
                continue  # the pair (b, a) needs fewer points
            points = self._refill(k, a, b)
            tried += len(points)
            point = self._pick(points, min(best, math.ceil(TOLERANCE * self.target) - 1))
            if point is None:
                continue
            both = point[None] if found is None else np.stack([found, point])
            found = self._pick(both, -1)
            best = self.levels.one(found) if found is not None else best
        return found

    def _refill(self, k: Ints, a: int, b: int) -> Ints:
        """For every number of removed levels of column ``a``, remove the fewest levels of column ``b`` that fit.

        Return these points, int64 [n_levels[a] + 1, n_columns]. If no number fits, all levels of ``b`` are removed.
        """
        points = np.repeat(k[None], self.n_levels[a] + 1, axis=0)
        points[:, a] = np.arange(self.n_levels[a] + 1)
        low, high = np.full(len(points), -1), np.full(len(points), self.n_levels[b])
        while (high - low > 1).any():
            points[:, b] = np.maximum((low + high) // 2, 0)
            fits = self.levels.cost(points) <= self.target
            low, high = np.where(fits, low, points[:, b]), np.where(fits, points[:, b], high)
        points[:, b] = high
        return points
