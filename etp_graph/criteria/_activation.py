"""Mean absolute activation of a unit."""

from __future__ import annotations

from torch import Tensor, nn

from etp_graph.collect import Observations
from etp_graph.plan import Plan

from ._common import Normalize, normalized, recorded


def activation(
    model: nn.Module, plan: Plan, *, record: Observations | None = None, normalize: Normalize = "mean"
) -> Tensor:
    """Return ``E |a_u|``, the mean absolute activation over samples, places (pixels or tokens) and layers.

    Source: Molchanov et al. 2017, section 2.2.

    Args:
        model: the model that the plan was traced from.
        plan: the plan.
        record: the record of :func:`etp_graph.collect.activations`.
        normalize: as for :func:`magnitude`.

    Returns:
        Scores, float [plan.n_units]; zero for locked groups, whose activations are not recorded.

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: there is no record, or it lacks groups.
    """
    return normalized("activation", recorded("activation", model, plan, record), plan, normalize)
