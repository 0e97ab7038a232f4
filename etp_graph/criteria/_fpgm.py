"""Distance of a unit from the other units of its group."""

from __future__ import annotations

from torch import Tensor, nn

from etp_graph.plan import Plan

from ._common import Normalize
from ._gram import relation_scores
from ._registry import register_criterion


@register_criterion("fpgm")
def fpgm(model: nn.Module, plan: Plan, *, normalize: Normalize = "mean") -> Tensor:
    """Return Σ_v ‖w_u − w_v‖ over the units v of the group, over all slices of a unit (FPGM: He et al. 2019).

    The units with the lowest sums are closest to the geometric median of the group, so others can replace them.

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
        squares = products.diagonal()
        apart = (squares + squares.unsqueeze(1) - 2 * products).clamp_min(0)
        return apart.fill_diagonal_(0).sqrt().sum(1)

    return relation_scores("fpgm", model, plan, normalize, sums)
