"""Second-order change of the loss when a unit goes and the other units make good what they can."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from etp_graph.collect import Observations, Statistic, WatchPoint
from etp_graph.criteria._common import recorded
from etp_graph.criteria._registry import register_criterion
from etp_graph.plan import Plan

from ._block_losses import surgeon_losses
from ._obs import finite_moment, vectors_of


class Factors(Statistic):
    """Second moments of the inputs of a layer, and of the gradients of the loss by these inputs."""

    backward: ClassVar[bool] = True

    def __init__(self, site: WatchPoint) -> None:
        super().__init__(site)
        size = len(site.index)
        self._inputs = torch.zeros(0, 0, device="cpu")
        self._gradients = torch.zeros(0, 0, device="cpu")
        self._shape = (size, size)
        self._count = 0

    def update(self, values: Tensor, labels: Tensor | None) -> None:
        """Do nothing, because activations alone do not tell the change of the loss."""

    def join(self, values: Tensor, gradients: Tensor) -> None:
        """See :class:`Statistic`."""
        if not self.samples:
            self._inputs = values.new_zeros(self._shape, dtype=torch.float64)
            self._gradients = torch.zeros_like(self._inputs)
        inputs, slopes = vectors_of(values), vectors_of(gradients)
        self._inputs.addmm_(inputs.mT, inputs)
        self._gradients.addmm_(slopes.mT, slopes)
        self._count += len(inputs)
        self.samples += len(values)

    def result(self) -> Tensor:
        """See :class:`Statistic`. Raises :class:`ScoreError` for activations that are not finite."""
        second = finite_moment("kron_obs", self.site, self._inputs / max(self._count, 1))
        weight = finite_moment("kron_obs", self.site, self._gradients / max(self._count, 1))
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
