"""Weights times the norm of the activations that they read."""

from __future__ import annotations

from torch import Tensor, nn

from etp_graph.collect import Observations, RunningMean, WatchPoint
from etp_graph.criteria._common import Normalize, normalized, recorded
from etp_graph.criteria._registry import register_criterion
from etp_graph.plan import Plan

from ._reading import ReadingStatistic


class WeightedNorms(ReadingStatistic):
    """Σ_j Σ_i |W_ij| · sqrt(E x_j²) over the positions j of a unit and the outputs i that read them."""

    def __init__(self, site: WatchPoint) -> None:
        super().__init__(site)
        self._squares = RunningMean()

    def update(self, values: Tensor, labels: Tensor | None) -> None:
        """See :class:`Statistic`."""
        total = values.double().square().flatten(2).sum((0, 2))
        self._squares.add(total, values.numel() // max(values.shape[1], 1))
        self.samples += len(values)

    def result(self) -> Tensor:
        """See :class:`Statistic`."""
        norms = self._squares.value.sqrt()
        return self.summed(norms * self.column_sums(1).to(norms.device))


@register_criterion("wanda", observes=WeightedNorms)
def wanda(model: nn.Module, plan: Plan, *, record: Observations | None = None, normalize: Normalize = "mean") -> Tensor:
    """Return ``Σ_{j in u} Σ_i |W_ij| sqrt(E x_j²)``, the weights that read a unit times the size of what they read.

    x_j are the activations of the unit at the input of the layer W. A unit that several layers read has their mean. At
    a watch point without a reader (a recurrent layer, a linear layer after pooling), ``|W|`` counts as 1.

    Source: Wanda (Sun et al. 2023, eq. 1), summed over structures as in Wanda-sp (An et al. 2024, section 5). The root
    mean square takes the place of their norm over all tokens, which does not change the order.

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
    return normalized("wanda", recorded("wanda", model, plan, record), plan, normalize)
