"""Select the units that stay, given their scores and a budget.

The units of each group form *levels*: the smallest sets of units that the group's constraints allow to be removed
together. Levels of a group are removed in order of score, lowest first. The *key* of a level gives its place among the
levels of other groups; the budget's scope defines it. The cost falls with every level, so bisection finds how many
levels to remove. If the last level removed more than needed, levels are given back (their units stay) as far as they
fit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from etp_graph.errors import BudgetError, PlanError, ScoreError
from etp_graph.latency import NextToken, WallClock
from etp_graph.plan import CostModel, Ints, Plan, Selection

from ._budget import Budget
from ._latency_fit import LatencySearch
from ._levels import Floats, Levels, ranked_quantity
from ._search import LevelSearch


def allocate(model: nn.Module, plan: Plan, scores: Tensor, *, budget: Budget, example_inputs: Any = None) -> Selection:
    """Select the units that stay: those with the highest scores that fit the budget.

    The cost never exceeds a target that is counted. It is within 1 % of the target, or no single level can be
    given back or exchanged to come closer. With ``uniform``, levels are not exchanged, because each spans many groups.
    If the dense model fits the budget, all units stay.

    For a target in time, the layers are timed at several sizes. Then pruned copies of the model are timed, in turns
    with the dense model, until one meets the target within ``budget.tolerance``. ``Selection.latency`` holds the
    target, the prediction and the measurement. If the pruned model is still slower, a warning is issued
    (:class:`etp_graph.LatencyMissed`).

    Args:
        model: the model that the plan was traced from. Only its names and shapes are read. For a target in time the
            model also runs forward in eval mode. The model is not changed.
        plan: the plan.
        scores: float [plan.n_units], any device; higher is more important. Scores of locked groups
            must be finite, and are not used.
        budget: the target and the rules.
        example_inputs: as for :func:`etp_graph.trace`; needed for a target in time, and not used for any other.

    Raises:
        PlanError: the plan was traced from another model, or every group is locked.
        ScoreError: the scores have another shape, or are not finite.
        BudgetError: the target is not reached even if every unit that may be removed is removed; the message gives the
            closest target that is. For a target in time also: example inputs are missing, the model has tensors on the
            meta device, or it cannot be copied.
    """
    values = _checked_scores(model, plan, scores)
    if budget.measured:
        if example_inputs is None:
            raise BudgetError(
                f"{budget.as_given} is measured with real inputs: give allocate(..., example_inputs=...)."
            )
        inputs = NextToken(example_inputs) if budget.decode else example_inputs
        return LatencySearch(model, plan, values, budget, inputs, _solve, WallClock()).run()
    levels, gone, _ = _levels_to_target(plan, values, budget)
    return Selection.from_flat(plan, torch.from_numpy(levels.keep(gone)))


def under_way(model: nn.Module, plan: Plan, scores: Tensor, *, budget: Budget, share: float) -> Selection:
    """Select the units that stay at an intermediate step of gradual pruning.

    The final selection is that of :func:`allocate`. Of the levels that it removes, the least important ones are
    removed, as many as ``share`` asks for. A selection that fits the intermediate cost more closely could remove units
    that the final one keeps. Training would bring these units to zero before they are kept again.

    Args:
        model: as for :func:`allocate`.
        plan: the plan.
        scores: float [plan.n_units].
        budget: the final target, in a quantity that is counted.
        share: share of the final saving, in [0, 1]; at least this share is saved.

    Raises:
        PlanError, ScoreError, BudgetError: as :func:`allocate`.
    """
    levels, gone, target = _levels_to_target(plan, _checked_scores(model, plan, scores), budget)
    dense = levels.one(np.zeros_like(gone))
    if share < 1 and gone.any():
        gone = LevelSearch(levels, dense - int(share * (dense - target))).first_point_towards(gone)
    return Selection.from_flat(plan, torch.from_numpy(levels.keep(gone)))


def _levels_to_target(plan: Plan, values: Floats, budget: Budget) -> tuple[Levels, Ints, int]:
    """Return the levels, how many levels of each column :func:`allocate` removes, and the target.

    The target is the dense cost if that is lower than the budget's.
    """
    costs = CostModel(plan, dict.fromkeys((budget.quantity, ranked_quantity(budget))))
    dense = int(costs.totals(costs.sizes[None])[budget.quantity][0])
    target = min(budget.largest_amount(dense), dense)
    levels = Levels(costs, values, budget)
    if dense == target:
        return levels, np.zeros_like(levels.n_levels), target
    least = levels.one(levels.n_levels)
    if least > target:
        raise BudgetError(
            f"{budget.as_given} is out of reach: the closest is {budget.reachable(dense, least)}, with every "
            "group at its floor. Ask for that, lower min_units, raise max_ratio, lower round_to, or unlock groups "
            f"(print(plan) says why they are locked).{_UNIFORM if budget.uniform else ''}"
        )
    return levels, _solve(levels, target), target


_UNIFORM = " With uniform=, one locked group also keeps the others of its kind that are built like it."


def _solve(levels: Levels, target: int) -> Ints:
    """Return how many levels of each column to remove, int64 [n_columns], so that the cost just fits the target."""
    return LevelSearch(levels, target).solve()


def _checked_scores(model: nn.Module, plan: Plan, scores: Tensor) -> Floats:
    """Return the scores as float64 [n_units] on the CPU, after checks of the model, the plan and the scores."""
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
