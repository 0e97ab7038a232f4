"""Mean absolute activation of a unit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etp_graph.collect import Observations, RunningMean, Statistic, WatchPoint
from etp_graph.criteria._common import Normalize, normalized, recorded
from etp_graph.criteria._registry import register_criterion
from etp_graph.plan import Plan


class Magnitudes(Statistic):
    """E |a| over samples and places."""

    def __init__(self, site: WatchPoint) -> None:
        super().__init__(site)
        self._mean = RunningMean()

    def update(self, values: Tensor, labels: Tensor | None) -> None:
        """See :class:`Statistic`."""
        total = values.abs().flatten(2).sum((0, 2), dtype=torch.float64)
        self._mean.add(total, values.numel() // max(values.shape[1], 1))
        self.samples += len(values)

    def result(self) -> Tensor:
        """See :class:`Statistic`."""
        return self.site.average(self._mean.value)


@register_criterion("activation", observes=Magnitudes)
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
