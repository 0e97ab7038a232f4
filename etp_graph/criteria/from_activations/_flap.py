"""Fluctuation of the activations of a unit, times the weights that read them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etp_graph.collect import Observations, WatchPoint
from etp_graph.criteria._common import recorded
from etp_graph.criteria._registry import register_criterion
from etp_graph.plan import Plan

from ._reading import ReadingStatistic


class Fluctuations(ReadingStatistic):
    """Σ_j Var(x_j) · ‖W_:j‖² over the positions j of a unit.

    The variance is updated batch by batch (Chan et al. 1979), because a difference of large sums loses its digits.
    """

    def __init__(self, site: WatchPoint) -> None:
        super().__init__(site)
        self._count = 0
        self._mean: Tensor | None = None
        self._spread: Tensor | None = None

    def update(self, values: Tensor, labels: Tensor | None) -> None:
        """See :class:`Statistic`."""
        wide = values.double().flatten(2)
        count = wide.shape[0] * wide.shape[2]
        if count == 0:
            return
        mean = wide.mean((0, 2))
        spread = (wide - mean.view(1, -1, 1)).square().sum((0, 2))
        if self._mean is None or self._spread is None:
            self._mean, self._spread = mean, spread
        else:
            total, step = self._count + count, mean - self._mean
            self._mean = self._mean + step * (count / total)
            self._spread = self._spread + spread + step.square() * (self._count * count / total)
        self._count += count
        self.samples += len(values)

    def result(self) -> Tensor:
        """See :class:`Statistic`."""
        assert self._spread is not None
        variance = self._spread / max(self._count, 1)
        return self.summed(variance * self.column_sums(2).to(variance.device))


@register_criterion("flap", observes=Fluctuations)
def flap(model: nn.Module, plan: Plan, *, record: Observations | None = None) -> Tensor:
    """Return ``Σ_{j in u} Var(x_j) ‖W_:j‖²``, standardized within its group, plus a constant.

    This is the mean square of what the output of the layer W loses, if the mean of the unit goes into its bias and its
    positions are independent. The scores of each group get the mean 0 and the variance 1, so that groups can be
    compared. The constant makes the lowest score of all 0.

    Source: FLAP (An et al. 2024, eq. 5 and 6).

    Args:
        model: the model that the plan was traced from.
        plan: the plan.
        record: the record of :func:`etp_graph.collect.activations`.

    Returns:
        Scores, float [plan.n_units]; zero for locked groups, whose activations are not recorded.

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: there is no record, or it lacks groups.
    """
    scores = recorded("flap", model, plan, record)
    spans = [span for group, span in plan.spans() if group.locked is None]
    for span in spans:
        part = scores[span]
        noise = 16 * torch.finfo(part.dtype).eps * float(part.abs().mean())
        scale = part.std(correction=0).clamp_min(max(noise, torch.finfo(part.dtype).tiny))
        scores[span] = (part - part.mean()) / scale
    lowest = min((float(scores[span].min()) for span in spans), default=0.0)
    for span in spans:
        scores[span] -= lowest
    return scores.clamp_min(0)
