"""Filters that are small, or that others resemble."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..plan import Plan
from .common import Normalize, finite, normalized, units_of
from .gram import grams


@torch.no_grad()
def whc(model: nn.Module, plan: Plan, *, normalize: Normalize = "mean") -> Tensor:
    """``‖w_u‖ Σ_{v≠u} ‖w_v‖ (1 − |cos(w_u, w_v)|)`` in the group, over all slices of a unit (WHC: Chen et al. 2023).

    The norm of a unit, times its dissimilarity to all others, each weighted with the other's norm.

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
        norms = products.diagonal().sqrt()
        # ‖u‖·‖v‖·(1 − |cos|) = ‖u‖·‖v‖ − |⟨u, v⟩|, which needs no division by a norm that may be zero.
        apart = (norms * norms.unsqueeze(1) - products.abs()).clamp_min(0)
        scores[span] = apart.fill_diagonal_(0).sum(1).to(scores)
    return normalized("whc", finite("whc", scores, units.tensors(model).items()), plan, normalize)
