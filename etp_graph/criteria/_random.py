"""Random scores, as a control."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etp_graph.plan import Plan

from ._common import units_of
from ._registry import register_criterion


@register_criterion("random")
def random(model: nn.Module, plan: Plan, *, seed: int = 0) -> Tensor:
    """Return uniform random scores in [0, 1), as a control for other criteria.

    Returns:
        Scores, float [plan.n_units]; the same for the same seed on every device.

    Raises:
        PlanError: the plan is not of this model.
    """
    units = units_of(model, plan)
    return torch.rand(plan.n_units, generator=torch.Generator().manual_seed(seed), device="cpu").to(units.device)
