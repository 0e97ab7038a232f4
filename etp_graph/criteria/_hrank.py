"""How much a feature map can tell: its rank."""

from __future__ import annotations

from torch import Tensor, nn

from etp_graph.collect import Observations
from etp_graph.plan import Plan

from ._common import Normalize, normalized, recorded


def hrank(model: nn.Module, plan: Plan, *, record: Observations | None = None, normalize: Normalize = "mean") -> Tensor:
    """E rank(o_u), the mean rank of the feature map [H, W] of a channel (HRank: Lin et al. 2020, eq. 5).

    Units of linear layers have no map. The natural generalisation is the matrix [tokens, width] of a unit in one
    sample: of a head its tokens times the dimensions of the head. A neuron has width 1, and its rank is 1 or, where it
    is silent, 0: the mean is the share of samples in which it is active at all (Hu et al. 2016 prune by that).

    Args:
        model: the model that the plan was traced from.
        plan: the plan.
        record: of :func:`etp_graph.collect.activations`.
        normalize: as for :func:`magnitude`: ranks grow with the size of the maps.

    Returns:
        Scores, float [plan.n_units]; zero for locked groups, which are not watched.

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: there is no record, or it lacks groups.
    """
    return normalized("hrank", recorded("hrank", model, plan, record), plan, normalize)
