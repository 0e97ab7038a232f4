"""Rank of the feature maps of a unit."""

from __future__ import annotations

from torch import Tensor, nn

from etp_graph.collect import Observations
from etp_graph.plan import Plan

from ._common import Normalize, normalized, recorded


def hrank(model: nn.Module, plan: Plan, *, record: Observations | None = None, normalize: Normalize = "mean") -> Tensor:
    """Return E rank(o_u), the mean rank of the feature map [H, W] of a channel (HRank: Lin et al. 2020, eq. 5).

    Units of linear layers have no feature map. Instead, the rank of the matrix [tokens, width] of a unit in one sample
    is used; the width of a head is its number of dimensions. A neuron has width 1, so its rank is 1 if it is active for
    any token, else 0. The mean rank is then the share of samples in which it is active (compare Hu et al. 2016).

    Args:
        model: the model that the plan was traced from.
        plan: the plan.
        record: the record of :func:`etp_graph.collect.activations`.
        normalize: as for :func:`magnitude`. Ranks grow with the size of the feature maps.

    Returns:
        Scores, float [plan.n_units]; zero for locked groups, whose activations are not recorded.

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: there is no record, or it lacks groups.
    """
    return normalized("hrank", recorded("hrank", model, plan, record), plan, normalize)
