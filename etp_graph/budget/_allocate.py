"""From scores and a budget to a selection: which units go, so that the cost just fits.

In every group the units form *levels*: the smallest sets that may go together under the group's constraints, the
lowest scores first. Removing is walking down these stairs, so a lower-scored unit never outlives a higher-scored one of
its group. Across groups a level's *key* decides, as the budget's scope says. The number of levels that go is found by
bisection, since the cost falls with every level; what that overshoots is given back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from etp_graph.errors import BudgetError, PlanError, ScoreError
from etp_graph.latency import WallClock
from etp_graph.plan import CostModel, Ints, Plan, Selection

from ._budget import Budget
from ._latency_fit import LatencySearch
from ._levels import Floats, Levels
from ._search import LevelSearch


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
    values = _checked_scores(model, plan, scores)
    if budget.quantity == "latency":
        if example_inputs is None:
            raise BudgetError(
                f"{budget.as_given} is measured with real inputs: give allocate(..., example_inputs=...)."
            )
        return LatencySearch(model, plan, values, budget, example_inputs, _solve, WallClock()).run()
    levels, gone, _ = _levels_to_target(plan, values, budget)
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
    levels, gone, target = _levels_to_target(plan, _checked_scores(model, plan, scores), budget)
    dense = levels.one(np.zeros_like(gone))
    if share < 1 and gone.any():
        gone = LevelSearch(levels, dense - int(share * (dense - target))).first_point_towards(gone)
    return Selection.from_flat(plan, torch.from_numpy(levels.keep(gone)))


def _levels_to_target(plan: Plan, values: Floats, budget: Budget) -> tuple[Levels, Ints, int]:
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
            f"{budget.as_given} is out of reach: the closest is {budget.reachable(costs.dense, least)}, with every "
            "group at its floor. Ask for that, lower min_units, raise max_ratio, lower round_to, or unlock groups "
            "(print(plan) says why they are locked)."
        )
    return levels, _solve(levels, target), target


def _solve(levels: Levels, target: int) -> Ints:
    """The point whose cost is highest below the target."""
    return LevelSearch(levels, target).solve()


def _checked_scores(model: nn.Module, plan: Plan, scores: Tensor) -> Floats:
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
