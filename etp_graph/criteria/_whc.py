"""Norm of a unit times its dissimilarity to the other units of its group."""

from __future__ import annotations

from torch import Tensor, nn

from etp_graph.plan import Plan

from ._common import Normalize
from ._gram import relation_scores
from ._registry import register_criterion


@register_criterion("whc")
def whc(model: nn.Module, plan: Plan, *, normalize: Normalize = "mean") -> Tensor:
    """Return ``‖w_u‖ Σ_{v≠u} ‖w_v‖ (1 − |cos(w_u, w_v)|)`` over the units v of the group (WHC: Chen et al. 2023).

    This is the norm of a unit, times its dissimilarity to all other units, weighted with their norms. Norms and cosines
    are over all slices of a unit.

    Needs memory for n² float64 numbers, n being the number of units of the largest group.

    Args:
        model: the model that the plan was traced from.
        plan: the plan.
        normalize: as for :func:`magnitude`. The sums grow with the number of units in a group.

    Returns:
        Scores, float [plan.n_units].

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: a parameter is not finite, or ``normalize`` is unknown.
    """

    def sums(products: Tensor) -> Tensor:
        norms = products.diagonal().sqrt()
        # ‖u‖·‖v‖·(1 − |cos|) = ‖u‖·‖v‖ − |⟨u, v⟩|, which avoids a division by a norm of zero.
        apart = (norms * norms.unsqueeze(1) - products.abs()).clamp_min(0)
        return apart.fill_diagonal_(0).sum(1)

    return relation_scores("whc", model, plan, normalize, sums)
