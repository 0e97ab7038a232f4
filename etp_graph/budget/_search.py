"""Class _search: the point closest below the target."""

from __future__ import annotations

import heapq
import itertools
import math

import numpy as np

from etp_graph.plan import Ints

from ._levels import Levels

TOLERANCE = 0.99
"""A selection that costs at least this share of the target is close enough to stop searching."""

_MAX_STATES = 1 << 14

_MAX_MOVES = 256


class LevelSearch:
    """Looks for the point whose cost is highest below the target, changing the order of removal as little as it can."""

    def __init__(self, levels: Levels, target: int) -> None:
        self.levels, self.target = levels, target
        self.n_levels, self.position = levels.n_levels, levels.position
        self.lost = [np.append(0, position.cumsum()) for position in levels.position]

    def close_enough(self, cost: int) -> bool:
        """Whether the cost is so close below the target that the search may end."""
        return cost >= TOLERANCE * self.target

    def solve(self) -> Ints:
        """How many levels of each column go, int64 [n_columns]."""
        k = self._fill(self._bisect(self.levels.order), spare_dead=True)
        if not self.close_enough(self.levels.one(k)):
            k = self._fill(k, spare_dead=False)
        if self.close_enough(self.levels.one(k)):
            return k
        if math.prod((self.n_levels + 1).tolist()) <= _MAX_STATES:
            return self._enumerate()
        return self._exchange(k)

    def first_point_towards(self, end: Ints) -> Ints:
        """The point on the way to ``end`` that is the first to meet the target, int64 [n_columns]."""
        places = [position[:count] for position, count in zip(self.position, end, strict=True)]
        return self._bisect(self.levels.order[np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *places]))])

    def _bisect(self, order: Ints) -> Ints:
        """The shortest run of the levels ``order`` (their columns) whose removal meets the target."""
        low, high = -1, len(order)
        while high - low > 1:
            middle = (low + high) // 2
            if self.levels.one(self._after(order[:middle])) <= self.target:
                high = middle
            else:
                low = middle
        return self._after(order[:high])

    def _after(self, gone: Ints) -> Ints:
        """The point at which these levels (their columns) are gone, int64 [n_columns]."""
        return np.bincount(gone, minlength=len(self.n_levels))

    def _fill(self, k: Ints, *, spare_dead: bool) -> Ints:
        """Give levels back, the last removed first, as long as they fit; dead ones (all scores zero) only if asked.

        A level that does not fit never fits later, because every other level given back makes it dearer.
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
        """The best of all points: close to the target with the least important levels gone, else the closest."""
        points = np.indices(tuple(self.n_levels + 1)).reshape(len(self.n_levels), -1).T
        costs = self.levels.cost(points)
        fits = costs <= self.target
        return self._pick(points, int(costs[fits].max()) - 1)  # type: ignore[return-value]  # one of them fits

    def _exchange(self, k: Ints) -> Ints:
        """Exchange levels between two columns while that comes closer: one for one, then any numbers of them."""
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
        """The best point above the cost ``best`` with one level more gone and one of another column back."""
        eye = np.eye(len(k), dtype=np.int64)
        back = np.flatnonzero(k).tolist()
        more = np.flatnonzero(k < self.n_levels).tolist()
        points = [k + eye[c] - eye[b] for c in more for b in back if b != c]
        return self._pick(np.array(points), best) if points else None

    def _pick(self, points: Ints, best: int) -> Ints | None:
        """The least important loss among the points close to the target; else the closest, if above ``best``."""
        costs = np.where((found := self.levels.cost(points)) <= self.target, found, -1)
        if costs.max() <= best:
            return None
        candidates = points[costs >= min(TOLERANCE * self.target, costs.max())]
        return np.asarray(candidates[self._loss(candidates).argmin()])

    def _loss(self, points: Ints) -> Ints:
        """How far up the order of removal the levels stand that are gone, summed, [n], at the points [n, n_columns]."""
        return np.asarray(sum(lost[points[:, c]] for c, lost in enumerate(self.lost)))

    def _trade(self, k: Ints, best: int) -> Ints | None:
        """The best point above the cost ``best`` in which only two columns differ."""
        found: Ints | None = None
        tried = 0
        for a, b in itertools.permutations(range(len(k)), 2):
            if self.close_enough(best) and tried > _MAX_STATES:
                break
            if self.n_levels[a] > self.n_levels[b]:
                continue  # (b, a) covers it with fewer points
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
        """For every number of levels of column ``a`` the point with the fewest of column ``b`` gone that fits."""
        points = np.repeat(k[None], self.n_levels[a] + 1, axis=0)
        points[:, a] = np.arange(self.n_levels[a] + 1)
        low, high = np.full(len(points), -1), np.full(len(points), self.n_levels[b])
        while (high - low > 1).any():
            points[:, b] = np.maximum((low + high) // 2, 0)
            fits = self.levels.cost(points) <= self.target
            low, high = np.where(fits, low, points[:, b]), np.where(fits, points[:, b], high)
        points[:, b] = high
        return points
