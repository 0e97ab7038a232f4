"""F statistic of the activations of a unit between classes."""

from __future__ import annotations

from torch import Tensor, nn

from etp_graph.collect import Observations
from etp_graph.plan import Plan

from ._common import recorded


def f_statistic(model: nn.Module, plan: Plan, *, record: Observations | None = None) -> Tensor:
    """Return the F statistic of a one-way analysis of variance: between-class over within-class variance.

        F = [Σ_k n_k (μ_k − μ)² / (K − 1)] / [Σ_k Σ_{i in k} (a_i − μ_k)² / (n − K)]

    a_i is the activation of a channel in sample i, averaged over its places (pixels or tokens). A unit of several
    channels or dimensions has the mean of their F.

    Source: Fisher 1925, as the screening of features by class-conditional statistics.

    Args:
        model: the model that the plan was traced from.
        plan: the plan.
        record: the record of :func:`etp_graph.collect.activations`, with the labels of every batch.

    Returns:
        Scores, float [plan.n_units]; zero for locked groups, whose activations are not recorded.

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: there is no record, or it lacks groups.
    """
    return recorded("f_statistic", model, plan, record)
