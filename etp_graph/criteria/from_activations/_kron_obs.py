"""Second-order change of the loss when a unit goes and the other units make good what they can."""

from __future__ import annotations

from torch import Tensor, nn

from etp_graph.collect import BackwardStatistic, Observations, RunningMean, WatchPoint
from etp_graph.criteria._common import recorded
from etp_graph.criteria._registry import register_criterion
from etp_graph.plan import Plan

from ._block_losses import surgeon_losses
from ._obs import finite_moment, vectors_of


class Factors(BackwardStatistic):
    """Second moments of the inputs of a layer, and of the gradients of the loss by these inputs."""

    def __init__(self, site: WatchPoint) -> None:
        super().__init__(site)
        self._inputs, self._gradients = RunningMean(), RunningMean()

    def join(self, values: Tensor, gradients: Tensor) -> None:
        """See :class:`Statistic`."""
        for mean, vectors in ((self._inputs, vectors_of(values)), (self._gradients, vectors_of(gradients))):
            mean.add(vectors.mT @ vectors, len(vectors))
        self.samples += len(values)

    def result(self) -> Tensor:
        """See :class:`Statistic`. Raises :class:`ScoreError` for activations that are not finite."""
        second = finite_moment("kron_obs", self.site, self._inputs.value)
        weight = finite_moment("kron_obs", self.site, self._gradients.value)
        return surgeon_losses(second, weight, self.site.local.to(second.device))


@register_criterion("kron_obs", observes=Factors)
def kron_obs(model: nn.Module, plan: Plan, *, record: Observations | None = None) -> Tensor:
    """Return ``½ tr(([M⁻¹]_uu)⁻¹ [Wᵀ G W]_uu)``, the loss of removing u after compensation, with Kronecker factors.

    M is the second moment of the inputs of the layer W that reads u, plus a ridge. G is that of the gradients by its
    outputs, so that ``Wᵀ G W`` is the second moment of the gradients by its inputs, which is recorded. With the loss
    :class:`etp_graph.collect.OwnLabels` the Kronecker product of M and G approximates the curvature of the
    Kullback-Leibler divergence from the dense model. Units are removed from the layer in rounds, and M and W follow. A
    unit that several layers read has their mean. Needs two matrices, float64 [inputs, inputs], for each layer.

    Source: Kron-OBS of EigenDamage (Wang et al. 2019, section 4.1), for structures of any width.

    Args:
        model: the model that the plan was traced from.
        plan: the plan.
        record: the record of :func:`etp_graph.collect.activations` with a backward of each batch.

    Returns:
        Scores, float [plan.n_units]; zero for locked groups, whose activations are not recorded.

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: there is no record, it lacks groups, or activations are not finite.
    """
    return recorded("kron_obs", model, plan, record)
