"""From scores and a budget to a selection: which units go, so that the cost just fits.

In every group the units form *levels*: the smallest sets that may go together under the group's constraints, the
lowest scores first. Removing is walking down these stairs, so a lower-scored unit never outlives a higher-scored one of
its group. Across groups a level's *key* decides, as the budget's scope says. The number of levels that go is found by
bisection, since the cost falls with every level; what that overshoots is given back.
"""

from __future__ import annotations

import heapq
import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .budget import Budget
from .costs import CostModel, Ints
from .errors import BudgetError, PlanError, ScoreError
from .latency import WallClock
from .latency_fit import Fitting
from .plan import Plan, Selection
from .stairs import Floats, Levels

__all__ = ["TOLERANCE", "Budget", "allocate"]

TOLERANCE = 0.99
"""A selection that costs at least this share of the target is close enough to stop searching."""
_MAX_STATES = 1 << 14
_MAX_MOVES = 256


def allocate(model: nn.Module, plan: Plan, scores: Tensor, *, budget: Budget, example_inputs: Any = None) -> Selection:
    """The units that stay: the highest-scored ones that fit the budget.

    The cost never exceeds the target. It is within 1 % of it, or no single level can be given back or exchanged to come
    closer. A dense model that fits already keeps everything.

    A target in time is measured: the layers at several sizes, then whole pruned copies of the model in turns with the
    model, until one takes the target's time within ``budget.tolerance``. ``Selection.latency`` says target, prediction
    and measurement; a model that stays slower is warned about (:class:`etp_graph.LatencyMissed`).

    Args:
        model: the model that the plan was traced from; only names and shapes are read, but for a target in time, for
            which it runs forward in eval mode. Nothing of it changes.
        plan: the plan.
        scores: float [plan.n_units], any device; higher is more important. Scores of locked groups
            must be finite, and are not used.
        budget: the target and the rules.
        example_inputs: as for :func:`etp_graph.trace`; needed for a target in time, and not used for any other.

    Raises:
        PlanError: the model is not the plan's, or every group is locked.
        ScoreError: the scores have another shape, or are not finite.
        BudgetError: nothing that may be removed is enough; the message says what is reachable. For a target in time
            also: example inputs are missing, or the model cannot be copied.
    """
    values = _checked(model, plan, scores)
    if budget.quantity == "latency":
        if example_inputs is None:
            raise BudgetError(f"{budget.words} is measured with real inputs: give allocate(..., example_inputs=...).")
        return Fitting(model, plan, values, budget, example_inputs, _solve, WallClock()).run()
    levels, gone, _ = _way(plan, values, budget)
    return Selection.from_flat(plan, torch.from_numpy(levels.keep(gone)))


def under_way(model: nn.Module, plan: Plan, scores: Tensor, *, budget: Budget, share: float) -> Selection:
    """What stays after a share of the way from the dense model to the selection of :func:`allocate`.

    The least important of the units that go in the end have gone; no other one has. A selection that fits the cost at
    this point more closely would take units that come back later, and what training has brought to zero is lost.

    Args:
        model: as for :func:`allocate`.
        plan: the plan.
        scores: float [plan.n_units].
        budget: the target at the end of the way, in MACs or parameters.
        share: of what has to be saved, in [0, 1]; at least so much of it is.

    Raises:
        PlanError, ScoreError, BudgetError: as :func:`allocate`.
    """
    levels, gone, target = _way(plan, _checked(model, plan, scores), budget)
    dense = levels.one(np.zeros_like(gone))
    if share < 1 and gone.any():
        gone = _Search(levels, dense - int(share * (dense - target))).towards(gone)
    return Selection.from_flat(plan, torch.from_numpy(levels.keep(gone)))


def _way(plan: Plan, values: Floats, budget: Budget) -> tuple[Levels, Ints, int]:
    """The levels, how many of each column go in the end, and the target (the dense cost, if that is lower)."""
    costs = CostModel(plan)
    target = budget.target(costs.dense)
    dense = getattr(costs.dense, budget.quantity)
    levels, target = Levels(costs, values, budget), min(target, dense)
    if dense == target:
        return levels, np.zeros_like(levels.n_levels), target
    least = levels.one(levels.n_levels)
    if least > target:
        raise BudgetError(
            f"{budget.words} is out of reach: the closest is {budget.reached(costs.dense, least)}, with every group at "
            "its floor. Ask for that, lower min_units, raise max_ratio, lower round_to, or unlock groups (print(plan) "
            "says why they are locked)."
        )
    return levels, _solve(levels, target), target


def _solve(levels: Levels, target: int) -> Ints:
    """The point whose cost is highest below the target."""
    return _Search(levels, target).solve()


def _checked(model: nn.Module, plan: Plan, scores: Tensor) -> Floats:
    """The scores as float64 [n_units] on the CPU."""
    plan.check(model)
    if not plan.prunable:
        raise PlanError(
            f"the plan has no prunable group (all {len(plan.groups)} are locked): print(plan) says why for each."
        )
    if not isinstance(scores, Tensor) or scores.is_complex() or tuple(scores.shape) != (plan.n_units,):
        found = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ScoreError(f"expected real scores of shape [{plan.n_units}], one for each unit of the plan, got {found}.")
    flat = scores.detach().to("cpu", torch.float64)
    for group, span in plan.spans():
        bad = ~flat[span].isfinite()
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise ScoreError(
                f"Group {group.name!r}: {int(bad.sum())} of {group.n_units} scores are not finite (unit {first}: "
                f"{float(flat[span][first])}); look for NaN or infinite weights, or a diverged training."
            )
    return np.asarray(flat.numpy(), dtype=np.float64)


class _Search:
    """Looks for the point whose cost is highest below the target, changing the order of removal as little as it can."""

    def __init__(self, levels: Levels, target: int) -> None:
        self.levels, self.target = levels, target
        self.n_levels, self.position = levels.n_levels, levels.position
        self.lost = [np.append(0, position.cumsum()) for position in levels.position]

    def near(self, cost: int) -> bool:
        """Whether the cost is so close below the target that the search may end."""
        return cost >= TOLERANCE * self.target

    def solve(self) -> Ints:
        """How many levels of each column go, int64 [n_columns]."""
        k = self._fill(self._bisect(self.levels.order), spare_dead=True)
        if not self.near(self.levels.one(k)):
            k = self._fill(k, spare_dead=False)
        if self.near(self.levels.one(k)):
            return k
        if math.prod((self.n_levels + 1).tolist()) <= _MAX_STATES:
            return self._enumerate()
        return self._exchange(k)

    def towards(self, end: Ints) -> Ints:
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
            if self.near(cost):
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
            if self.near(best) and tried > _MAX_STATES:
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
