"""Second-order change of the loss when the activations of a unit are set to zero."""

from __future__ import annotations

from torch import Tensor, nn

from etp_graph.collect import BackwardStatistic, Observations, RunningMean, WatchPoint
from etp_graph.criteria._common import recorded
from etp_graph.criteria._registry import register_criterion
from etp_graph.plan import Plan


class Gates(BackwardStatistic):
    """½ E (Σ_j x_j ∂L/∂x_j)² over the positions j of a unit: half the mean square of the gradient by its gate."""

    def __init__(self, site: WatchPoint) -> None:
        super().__init__(site)
        self._squares = RunningMean()

    def join(self, values: Tensor, gradients: Tensor) -> None:
        """See :class:`Statistic`."""
        products = values.double() * gradients.double()
        products = products.flatten(2).sum(2, keepdim=True) if products.ndim == 4 else products
        local = self.site.local.to(products.device)
        shape = (len(products), len(self.site.units), products.shape[2])
        gates = products.new_zeros(shape).index_add(1, local, products)
        self._squares.add(gates.square().sum((0, 2)), shape[0] * shape[2])
        self.samples += len(values)

    def result(self) -> Tensor:
        """See :class:`Statistic`."""
        return self._squares.value / 2


@register_criterion("fisher", observes=Gates)
def fisher(model: nn.Module, plan: Plan, *, record: Observations | None = None) -> Tensor:
    """Return ``½ E (Σ_{j in u} x_j ∂L/∂x_j)²``, half the Fisher information of a gate that scales the unit.

    The mean is over samples and tokens. The places of a feature map have one gate. With the loss
    :class:`etp_graph.collect.OwnLabels` this is the second-order estimate of the Kullback-Leibler divergence from the
    dense model when the gate is closed. With the labels of the data it is the same for the loss where the model fits
    them. A unit that several layers read has their mean.

    Source: Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning", eq. 4 to 8.

    Args:
        model: the model that the plan was traced from.
        plan: the plan.
        record: the record of :func:`etp_graph.collect.activations` with a backward of each batch. If all weights are
            frozen, gradients are computed for activations alone, which takes a third less time.

    Returns:
        Scores, float [plan.n_units]; zero for locked groups, whose activations are not recorded.

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: there is no record, or it lacks groups.
    """
    return recorded("fisher", model, plan, record)
