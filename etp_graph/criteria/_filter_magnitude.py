"""Mean absolute weight of the filters of a unit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etp_graph._config import quoted
from etp_graph.collect import filters_only
from etp_graph.errors import ScoreError
from etp_graph.plan import Plan, numbers_per_unit
from etp_graph.units import Units

from ._common import finite, units_of
from ._registry import register_criterion


@register_criterion("filter_magnitude")
def filter_magnitude(model: nn.Module, plan: Plan) -> Tensor:
    """Return Σ|w| / n over the n weights of the filters that produce a unit (Torque: Gupta et al. 2024, section 3.3).

    The L1 norm over the size of the filter makes filters of all layers comparable, so that one threshold serves the
    whole network. A unit that several layers produce (a channel of a residual stream) has the mean over all of them.
    Biases, norms and the weights that read the unit do not count.

    Returns:
        Scores, float [plan.n_units].

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: a parameter is not finite, or no layer with weights produces the units of an open group.
    """
    whole, filters = units_of(model, plan), filters_only(model, plan)
    units = Units(model, filters)
    with torch.no_grad():
        total = units.reduce(units.tensors(model), transform=torch.abs)
        finite("filter_magnitude", whole.squares(whole.tensors(model)), whole.tensors(model).items())
    count = numbers_per_unit(filters).to(total)
    bare = [g.name for g, span in plan.spans() if g.locked is None and bool((count[span] == 0).any())]
    if bare:
        raise ScoreError(
            f"filter_magnitude: no weights of a layer produce the units of {quoted(bare)}. Use another criterion, or "
            "plan.lock({name: reason}) for these groups."
        )
    return total / count.clamp_min(1)
