"""The torque of the linear force, in index order."""

from __future__ import annotations

from torch import Tensor, nn

from ..forces import Linear
from ..plan import Plan
from .etp import torque_of


def torque(model: nn.Module, plan: Plan) -> Tensor:
    """Torque with the linear force in index order (Torque: Gupta et al. 2024, eq. 9); otherwise as :func:`etp`.

    Returns:
        Scores, float [plan.n_units].

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: a parameter is not finite.
    """
    return torque_of(model, plan, Linear())
