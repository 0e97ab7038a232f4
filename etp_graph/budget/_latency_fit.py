"""Find a selection that meets a target in time.

Tables of layer times predict the time of a selection. The pruned model is then measured, and the measurement corrects
the next prediction.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from etp_graph.errors import BudgetError
from etp_graph.latency import TimedCosts, Timer, preferred_multiple, record_calls, steady_conditions
from etp_graph.model import named_tensors, plain_forward, preserved_rng
from etp_graph.plan import Ints, LatencyFit, Plan, Selection
from etp_graph.surgery import prune_

from ._budget import Budget
from ._levels import Floats, Levels

ITERATIONS = 5
"""Maximum number of pruned models that are measured."""

Solve = Callable[[Levels, int], Ints]
"""Function of levels and a target; returns how many levels of each column to remove, int64 [n_columns]."""


class LatencyMissed(UserWarning):
    """Warning: the pruned model is slower than its target by more than the tolerance, after all corrections."""


class _TimeCurve:
    """Curve from the sum of the tables to the measured time, as a share of the dense model's time.

    It interpolates between the measured models.
    """

    def __init__(self) -> None:
        self._points: dict[int, float] = {}

    def add(self, sum_: int, share: float) -> None:
        """Add a measured model. If its sum was measured before, take the mean of the two shares."""
        self._points[sum_] = (self._points.get(sum_, share) + share) / 2

    def _lines(self) -> tuple[Floats, Floats]:
        """Return the sums and shares at the corners of the curve, both ascending.

        Measured shares that fall as the sum rises are smoothed, because a larger sum must not predict a shorter time.
        """
        sums = np.array(sorted(self._points), dtype=np.float64)
        shares = np.array([self._points[int(sum_)] for sum_ in sums])
        low, high = np.maximum.accumulate(shares), np.minimum.accumulate(shares[::-1])[::-1]
        return sums, (low + high) / 2

    def share(self, sum_: int) -> float:
        """Return the expected share at this sum."""
        return float(np.interp(sum_, *self._lines()))

    def sum(self, share: float) -> int:
        """Return the largest sum at which this share is expected."""
        sums, shares = self._lines()
        return int(np.interp(share, shares + 1e-12 * np.arange(len(shares)), sums))


class LatencySearch:
    """One search for a selection whose pruned model meets a target in time.

    Args:
        model: the dense model. It is measured unchanged, and copied for each pruned model.
        plan: the plan of the model.
        scores: float64 [n_units].
        budget: a target in time.
        inputs: the example inputs.
        solve: finds the point whose sum of the tables, in nanoseconds, just fits a target.
        timer: times layers and models.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, scores: Floats, budget: Budget, inputs: Any, solve: Solve, timer: Timer
    ) -> None:
        self.model, self.plan, self.scores, self.budget = model, plan, scores, budget
        self.inputs, self.solve, self.timer = inputs, solve, timer
        self.curve, self.liked = _TimeCurve(), 1

    def run(self) -> Selection:
        """Return the selection, with the measured times in its ``latency``.

        Raises:
            BudgetError: even the smallest model is slower than the target, the model cannot be copied, or it has
                tensors on the meta device.
        """
        check_measurable(self.model, self.budget)
        with preserved_rng(self.model):
            with steady_conditions():
                costs = TimedCosts(self.plan, *record_calls(self.model, self.plan, self.inputs), self.timer)
                likes = preferred_multiple(costs, self.timer) if self.budget.round_to is None else 1
            for self.liked in sorted({likes, 1}, reverse=True):  # 1 if the target is out of reach with rounding
                levels = Levels(costs, self.scores, self.budget, liked=self.liked)
                dense, least = self._ends(levels)
                if self.budget.share_of_time(dense) >= 1:
                    return self._whole(dense)
                if least <= self.budget.share_of_time(dense) * dense:
                    return self._search(levels, dense)
        raise BudgetError(
            f"{self.budget.as_given} is out of reach: measured on this machine, the closest is "
            f"{self.budget.reachable_time(least, dense)}, with every group at its floor (the dense model takes "
            f"{dense * 1e3:.3f} ms). Ask for that, lower min_units, raise max_ratio, lower round_to, or unlock groups "
            "(print(plan) says why they are locked)."
        )

    def _whole(self, dense: float) -> Selection:
        """Return the selection that keeps all units; used if the dense model is fast enough."""
        keep = torch.ones(self.plan.n_units, dtype=torch.bool, device="cpu")
        return replace(Selection.from_flat(self.plan, keep), latency=self._fit(1.0, dense, dense, 0))

    def _ends(self, levels: Levels) -> tuple[float, float]:
        """Measure the dense and the smallest model, and start a new curve from both. Return their seconds."""
        self.curve = _TimeCurve()
        _, dense, least = self._measured(levels, levels.n_levels)
        self.curve.add(levels.one(0 * levels.n_levels), 1.0)
        return dense, least

    def _measured(self, levels: Levels, k: Ints) -> tuple[Selection, float, float]:
        """Prune a copy of the model at a point, time it in turns with the dense model, and add it to the curve.

        Returns the selection, the seconds of the dense model, and those of the pruned one.
        """
        selection = Selection.from_flat(self.plan, torch.from_numpy(levels.keep(k)))
        pruned = _copy(self.model)
        prune_(pruned, self.plan, selection)
        dense, seconds = self.timer.models([self.model, pruned], self.inputs)
        self.curve.add(levels.one(k), seconds / dense)
        return selection, dense, seconds

    def _search(self, levels: Levels, dense: float) -> Selection:
        """Alternate between solving for the target on the curve and measuring the pruned model.

        Ends when the target is met, when a point comes up that was measured before, or after :data:`ITERATIONS`.
        Returns the selection that comes closest to the target; one that is too slow only if all are.
        """
        found: list[tuple[LatencyFit, Selection]] = []
        seen: set[bytes] = set()
        whole = levels.one(0 * levels.n_levels)
        for number in range(1, ITERATIONS + 1):
            target = self.curve.sum(self.budget.share_of_time(dense))
            k = self.solve(levels, target) if target < whole else 0 * levels.n_levels
            if k.tobytes() in seen:
                break
            seen.add(k.tobytes())
            predicted = self.curve.share(levels.one(k))
            selection, dense, seconds = self._measured(levels, k)
            fit = self._fit(predicted, seconds, dense, number)
            found.append((fit, selection))
            if abs(fit.miss) <= self.budget.tolerance:
                break
        fit, selection = min(found, key=lambda pair: (pair[0].miss > self.budget.tolerance, abs(pair[0].miss)))
        if fit.miss > self.budget.tolerance:
            warnings.warn(
                f"{self.budget.as_given} was not met: {fit}. Measure on a machine that does nothing else, raise "
                "tolerance=, or lower round_to=.",
                LatencyMissed,
                stacklevel=4,
            )
        return replace(selection, latency=replace(fit, layers=self._by_layer(levels, selection)))

    def _by_layer(self, levels: Levels, selection: Selection) -> dict[str, tuple[float, float]]:
        costs = levels.costs
        assert isinstance(costs, TimedCosts)
        dense = costs.by_layer(costs.sizes[None])
        pruned = costs.by_layer(costs.counts(selection.flat(self.plan)))
        return {name: (1e3 * seconds, 1e3 * pruned[name]) for name, seconds in dense.items()}

    def _fit(self, predicted: float, seconds: float, dense: float, iterations: int) -> LatencyFit:
        return LatencyFit(
            target_ms=1e3 * dense * self.budget.share_of_time(dense), predicted_ms=1e3 * dense * predicted,
            measured_ms=1e3 * seconds, dense_ms=1e3 * dense, iterations=iterations,
            round_to=self.budget.round_to or self.liked,
        )  # fmt: skip


def check_measurable(model: nn.Module, budget: Budget) -> None:
    """Raise :class:`BudgetError` if the model has tensors on the meta device."""
    if any(tensor.is_meta for _, tensor in named_tensors(model)):
        raise BudgetError(
            f"{budget.as_given} is measured, and tensors on the meta device take no time: load the weights first."
        )


def _copy(model: nn.Module) -> nn.Module:
    try:
        with plain_forward(model):
            return copy.deepcopy(model)
    except (
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        MemoryError,
        pickle.PicklingError,
        copy.Error,
    ) as error:
        raise BudgetError(
            f"a latency is checked on a pruned copy of the model, and {type(model).__name__} cannot be copied "
            f"({error!r}): free memory, make copy.deepcopy(model) work, or give speed_up=, macs= or params=."
        ) from error
