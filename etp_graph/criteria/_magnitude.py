"""Norm of a unit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etp_graph.errors import ScoreError
from etp_graph.plan import Plan

from ._common import Normalize, finite, normalized, units_of
from ._registry import register_criterion


@register_criterion("magnitude")
def magnitude(model: nn.Module, plan: Plan, *, p: float = 2, normalize: Normalize = "mean") -> Tensor:
    """Return the group norm ``(Σ_s Σ |w_s,u|^p)^(1/p)`` over all slices of a unit.

    Source: Li et al. 2017; over all slices of a group: Fang et al. 2023.

    Args:
        model: the model that the plan was traced from.
        plan: the plan.
        p: order of the norm, positive and finite: 1, 2, ...
        normalize: ``"mean"``, ``"max"`` or ``"sum"``: divide the scores of each group by this value, so that groups of
            different width can be compared. ``"none"``: do not divide. A group of zeros stays zero.

    Returns:
        Scores, float [plan.n_units].

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: a parameter is not finite, or an argument is out of range.
    """
    if isinstance(p, bool) or not 0 < p < float("inf"):
        raise ScoreError(f"magnitude: p={p!r}; the order of a norm is positive and finite.")
    units = units_of(model, plan)
    with torch.no_grad():
        sums = units.reduce(units.tensors(model), transform=lambda w: w.abs().pow(p) if p != 1 else w.abs())
        scores = sums.pow(1 / p)
    return normalized("magnitude", finite("magnitude", scores, units.tensors(model).items()), plan, normalize)
