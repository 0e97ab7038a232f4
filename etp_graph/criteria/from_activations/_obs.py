"""Error that is left at the output of a layer when a unit goes and the other units make good what they can."""

from __future__ import annotations

from torch import Tensor, nn

from etp_graph.collect import Observations, RunningMean, WatchPoint
from etp_graph.criteria._common import Normalize, normalized, recorded
from etp_graph.criteria._registry import register_criterion
from etp_graph.errors import ScoreError
from etp_graph.plan import Plan

from ._block_losses import surgeon_losses
from ._reading import ReadingStatistic


class Residuals(ReadingStatistic):
    """Least mean square of the output of a layer that is lost with each unit, from the second moment of its inputs."""

    def __init__(self, site: WatchPoint) -> None:
        super().__init__(site)
        self._gram = RunningMean()

    def update(self, values: Tensor, labels: Tensor | None) -> None:
        """See :class:`Statistic`."""
        vectors = vectors_of(values)
        self._gram.add(vectors.mT @ vectors, len(vectors))
        self.samples += len(values)

    def result(self) -> Tensor:
        """See :class:`Statistic`. Raises :class:`ScoreError` for activations that are not finite."""
        second = finite_moment("obs", self.site, self._gram.value)
        columns = self.columns.to(second)
        return surgeon_losses(second, columns @ columns.mT, self.site.local.to(second.device))


def vectors_of(values: Tensor) -> Tensor:
    """Return activations [samples, positions, places...] as float64 [samples * places, positions]."""
    return values.flatten(2).movedim(1, -1).flatten(0, -2).double()


def finite_moment(what: str, site: WatchPoint, moment: Tensor) -> Tensor:
    """Return the moment. Raise :class:`ScoreError` if it is not finite."""
    if not bool(moment.isfinite().all()):
        raise ScoreError(
            f"{what}: activations at {site.module!r} are NaN or infinite: repair the model or the batches."
        )
    return moment


@register_criterion("obs", observes=Residuals)
def obs(model: nn.Module, plan: Plan, *, record: Observations | None = None, normalize: Normalize = "none") -> Tensor:
    """Return ``½ tr(W_u ([M⁻¹]_uu)⁻¹ W_uᵀ)``, what the next layer loses with a unit after compensation.

    M is the second moment of the inputs of the layer W, plus a ridge. Units that are combinations of others score low,
    however large they are. Units are removed from the layer in rounds, and M and W follow. A unit that several layers
    read has their mean. A kernel position of a convolution counts as an output of its own. Needs the memory of M,
    float64 [inputs, inputs] for each layer.

    Source: Optimal Brain Surgeon (Hassibi & Stork 1993, eq. 5) with the error of a layer as the loss (Frantar &
    Alistarh 2022, eq. 4), for structures as in SlimGPT (Ling et al. 2024).

    Args:
        model: the model that the plan was traced from.
        plan: the plan.
        record: the record of :func:`etp_graph.collect.activations`.
        normalize: as for :func:`magnitude`.

    Returns:
        Scores, float [plan.n_units]; zero for locked groups, whose activations are not recorded.

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: there is no record, it lacks groups, or activations are not finite.
    """
    return normalized("obs", recorded("obs", model, plan, record), plan, normalize)
