"""What an expert adds to the tokens that the router sends to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etp_graph.collect import Observations, Statistic, WatchPoint
from etp_graph.criteria._common import recorded
from etp_graph.criteria._registry import register_criterion
from etp_graph.plan import Plan


class ExpertOutputs(Statistic):
    """E g_j(x) ‖f_j(x)‖ over the tokens x that are sent to expert j."""

    of_experts = True

    def __init__(self, site: WatchPoint) -> None:
        super().__init__(site)
        self._total, self._count = torch.zeros(0), torch.zeros(0)

    def update(self, values: Tensor, labels: Tensor | None) -> None:
        """See :class:`Statistic`."""
        seen = ~values.isnan()
        total, count = values.nansum((0, 2)).double(), seen.sum((0, 2))
        self._total = total if not len(self._total) else self._total + total
        self._count = count if not len(self._count) else self._count + count
        self.samples += len(values)

    def result(self) -> Tensor:
        """See :class:`Statistic`."""
        return self.site.average(self._total / self._count.clamp(min=1))


@register_criterion("reap", observes=ExpertOutputs)
def reap(model: nn.Module, plan: Plan, *, record: Observations | None = None) -> Tensor:
    """Return ``E g_j(x) ‖f_j(x)‖`` over the tokens x that the router sends to expert j.

    g_j is the weight that the router gives the expert, and f_j(x) its output. An expert that gets no token scores 0.
    Use it with a plan that prunes experts alone (``prune="experts"``): units of other kinds are ranked by the norm of
    their weights.

    The layers are those of transformers, which take ``hidden_states``, ``top_k_index`` and ``top_k_weights``. Each runs
    twice while it is watched.

    Source: Lasby et al. 2025, "REAP the experts: why pruning prevails for one-shot MoE compression".

    Args:
        model: the model that the plan was traced from.
        plan: the plan.
        record: the record of :func:`etp_graph.collect.activations`.

    Returns:
        Scores, float [plan.n_units]; zero for locked groups, whose activations are not recorded.

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: there is no record, or it lacks groups; or, while recording, no layer of experts can be watched.
    """
    return recorded("reap", model, plan, record)
