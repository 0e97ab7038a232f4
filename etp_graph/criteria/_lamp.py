"""Squared norm of a unit, relative to the sum over all units of its group that are at least as large."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etp_graph.plan import Plan

from ._common import finite, units_of
from ._registry import register_criterion


@register_criterion("lamp")
@torch.no_grad()
def lamp(model: nn.Module, plan: Plan) -> Tensor:
    """Return ‖w_u‖² / Σ_v ‖w_v‖² over the units v of the group with ‖w_v‖ ≥ ‖w_u‖ (LAMP: Lee et al. 2021, for units).

    The largest unit of every group has score 1 (1/k if k units are equally large), so that groups of any scale and
    width can be compared.

    Returns:
        Scores, float [plan.n_units], in [0, 1].

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: a parameter is not finite.
    """
    units = units_of(model, plan)
    squares = finite("lamp", units.squares(units.tensors(model)), units.tensors(model).items())
    scores = torch.zeros_like(squares)
    for _, span in plan.spans():
        ascending = squares[span].sort().values
        rest = ascending.flip(0).cumsum(0).flip(0)
        at = torch.searchsorted(ascending, squares[span])  # the first of equal units, so that the sum has all of them
        scores[span] = squares[span] / rest[at].clamp_min(torch.finfo(squares.dtype).tiny)
    return scores
