"""Rank of the feature maps of a unit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etp_graph.collect import Observations, Statistic, WatchPoint
from etp_graph.criteria._common import Normalize, normalized, recorded
from etp_graph.criteria._registry import register_criterion
from etp_graph.errors import ScoreError
from etp_graph.plan import Plan


class Ranks(Statistic):
    """E rank, of the map [H, W] of each channel, or of the matrix [places, width] of each unit."""

    def __init__(self, site: WatchPoint) -> None:
        super().__init__(site)
        self._total: Tensor | None = None

    def update(self, values: Tensor, labels: Tensor | None) -> None:
        """See :class:`Statistic`. Raises :class:`ScoreError` for activations that are not finite."""
        values = values if values.dtype == torch.float64 else values.float()
        if not bool(values.isfinite().all()):
            raise ScoreError(f"hrank: activations at {self.site.module!r} are NaN or infinite: repair the model.")
        if values.ndim == 4:
            total = self.site.average(torch.linalg.matrix_rank(values).double().sum(0))
        else:
            total = values.new_zeros(len(self.site.units), dtype=torch.float64)
            for units, matrices in self.site.matrices(values):
                total[units.to(total.device)] = torch.linalg.matrix_rank(matrices).double().sum(0)
        self._total = total if self._total is None else self._total + total
        self.samples += len(values)

    def result(self) -> Tensor:
        """See :class:`Statistic`."""
        assert self._total is not None
        return self._total / max(self.samples, 1)


@register_criterion("hrank", observes=Ranks)
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
