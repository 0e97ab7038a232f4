"""Batch norm scales of a unit."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from etp_graph._config import quoted
from etp_graph.errors import ScoreError
from etp_graph.plan import Plan

from ._common import finite, units_of
from ._registry import register_criterion


@register_criterion("bn_scale")
def bn_scale(model: nn.Module, plan: Plan) -> Tensor:
    """Return the mean ``|γ|`` over the batch norms that a unit passes through (Network Slimming: Liu et al. 2017).

    Returns:
        Scores, float [plan.n_units].

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: a scale is not finite, or units of a group that is not locked pass through no batch norm.
    """
    units = units_of(model, plan)
    parameters = units.tensors(model)
    scales = {name: w for name, w in parameters.items() if name.endswith("weight") and _is_batch_norm(model, name)}
    with torch.no_grad():
        total = units.reduce(scales, transform=torch.abs)
        count = units.reduce({name: torch.ones_like(w) for name, w in scales.items()})
    finite("bn_scale", total, scales.items())
    bare = [g.name for g, span in plan.spans() if g.locked is None and bool((count[span] == 0).any())]
    if bare:
        raise ScoreError(
            f"bn_scale: units of {quoted(bare)} pass through no batch norm with a scale. Use another criterion, "
            "or plan.lock({name: reason}) for these groups."
        )
    return total / count.clamp_min(1)


def _is_batch_norm(model: nn.Module, parameter: str) -> bool:
    return isinstance(model.get_submodule(parameter.rpartition(".")[0]), _BatchNorm)
