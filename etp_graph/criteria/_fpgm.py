"""Filters near the geometric median of their group."""

from __future__ import annotations

from torch import Tensor, nn

from etp_graph.plan import Plan

from ._common import Normalize
from ._gram import relation_scores


def fpgm(model: nn.Module, plan: Plan, *, normalize: Normalize = "mean") -> Tensor:
    """Σ_v ‖w_u − w_v‖ over the units v of the group (FPGM: He et al. 2019), over all slices of a unit.

    The units with the lowest sums lie at the geometric median: the others can stand in for them.

    ``normalize`` is as for :func:`magnitude`, since the sums grow with the width of a group. Scores are float
    [plan.n_units]; they take memory for n² numbers of the widest group. Raises :class:`etp_graph.PlanError` if the plan
    is not of this model, :class:`etp_graph.ScoreError` if a parameter is not finite or ``normalize`` is unknown.
    """

    def sums(products: Tensor) -> Tensor:
        squares = products.diagonal()
        apart = (squares + squares.unsqueeze(1) - 2 * products).clamp_min(0)
        return apart.fill_diagonal_(0).sqrt().sum(1)

    return relation_scores("fpgm", model, plan, normalize, sums)
