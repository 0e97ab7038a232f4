"""Filters near the geometric median of their group."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..plan import Plan
from .common import Normalize, finite, normalized, units_of
from .gram import grams


@torch.no_grad()
def fpgm(model: nn.Module, plan: Plan, *, normalize: Normalize = "mean") -> Tensor:
    """Σ_v ‖w_u − w_v‖ over the units v of the group (FPGM: He et al. 2019), over all slices of a unit.

    The units with the lowest sums lie at the geometric median: the others can stand in for them.

    Args:
        model: the model that the plan was traced from.
        plan: the plan.
        normalize: as for :func:`magnitude`: the sums grow with the width of a group.

    Returns:
        Scores, float [plan.n_units]. Takes memory for n² numbers of the widest group.

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: a parameter is not finite, or ``normalize`` is unknown.
    """
    units = units_of(model, plan)
    scores = torch.zeros(plan.n_units, dtype=units.dtype, device=units.device)
    for span, products in grams(model, plan):
        squares = products.diagonal()
        apart = (squares + squares.unsqueeze(1) - 2 * products).clamp_min(0)
        scores[span] = apart.fill_diagonal_(0).sqrt().sum(1).to(scores)
    return normalized("fpgm", finite("fpgm", scores, units.tensors(model).items()), plan, normalize)
