"""Filters that are small, or that others resemble."""

from __future__ import annotations

from torch import Tensor, nn

from etp_graph.plan import Plan

from ._common import Normalize
from ._gram import relation_scores


def whc(model: nn.Module, plan: Plan, *, normalize: Normalize = "mean") -> Tensor:
    """``‖w_u‖ Σ_{v≠u} ‖w_v‖ (1 − |cos(w_u, w_v)|)`` in the group, over all slices of a unit (WHC: Chen et al. 2023).

    The norm of a unit, times its dissimilarity to all others, each weighted with the other's norm.

    ``normalize`` is as for :func:`magnitude`, since the sums grow with the width of a group. Scores are float
    [plan.n_units]; they take memory for n² numbers of the widest group. Raises :class:`etp_graph.PlanError` if the plan
    is not of this model, :class:`etp_graph.ScoreError` if a parameter is not finite or ``normalize`` is unknown.
    """

    def sums(products: Tensor) -> Tensor:
        norms = products.diagonal().sqrt()
        # ‖u‖·‖v‖·(1 − |cos|) = ‖u‖·‖v‖ − |⟨u, v⟩|, which needs no division by a norm that may be zero.
        apart = (norms * norms.unsqueeze(1) - products.abs()).clamp_min(0)
        return apart.fill_diagonal_(0).sum(1)

    return relation_scores("whc", model, plan, normalize, sums)
