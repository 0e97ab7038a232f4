"""The torque of a unit: at rest, the first-order loss of removing it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from etp_graph.errors import ScoreError
from etp_graph.forces import Exponential, Force, Linear
from etp_graph.plan import Plan, numbers_per_unit
from etp_graph.units import Rankings

from ._common import finite, units_of


class Forced(Protocol):
    """What the torque needs to know of a regularizer; :class:`etp_graph.Regularizer` is one."""

    @property
    def force(self) -> Force:
        """The force F."""

    @property
    def kappa(self) -> Tensor:
        """κ of the group of each unit, [n_units]."""

    def distances(self) -> Tensor:
        """Distance d_u of each unit, [n_units]."""


def etp(model: nn.Module, plan: Plan, *, regularizer: Forced | None = None) -> Tensor:
    """Torque κ_g·F(d_u)·‖w_u‖, over β the first-order loss of removing u (ETP: Modi et al. 2025, eq. 8-10).

    Where training with the penalty β Σ_g κ_g Σ_u F(d_u)·‖w_u‖ has come to rest, ∇_u L = −β κ_g F(d_u) w_u/‖w_u‖,
    so that −⟨∇_u L, w_u⟩ = β κ_g F(d_u)·‖w_u‖. A unit on which no force acts (F = 0: the pivot of a linear force,
    everything below the threshold of a step) gives no such estimate; it is scored with the smallest positive
    force of the units it is ranked with, instead of as worthless.

    Args:
        model: the model that the plan was traced from.
        plan: the plan.
        regularizer: the one that the model was trained with; default: the exponential force in index order.

    Returns:
        Scores, float [plan.n_units].

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: a parameter is not finite, or the regularizer is of another plan.
    """
    if regularizer is None:
        return torque_of(model, plan, Exponential())
    distance = regularizer.distances()
    if distance.numel() != plan.n_units:
        raise ScoreError(
            f"etp: the regularizer knows {distance.numel()} units, the plan {plan.n_units}: "
            "pass the regularizer that was made with this plan."
        )
    return torque_of(model, plan, regularizer.force, distance=distance, kappa=regularizer.kappa)


@torch.no_grad()
def torque_of(
    model: nn.Module, plan: Plan, force: Force, *, distance: Tensor | None = None, kappa: Tensor | None = None
) -> Tensor:
    """κ·F(d)·⟨∇P, w⟩ [n_units], P being what the force acts on: ‖w‖, ‖w‖²/2 of a squared one, ‖w‖₁ of one by element.

    Without ``distance`` the order is that of the index, without ``kappa`` the square root of the numbers per unit.
    """
    units = units_of(model, plan)
    runs = Rankings.of(plan, units.device)
    norms = finite("the torque", units.squares(units.tensors(model)).sqrt(), units.tensors(model).items())
    if distance is None:
        distance = runs.distance(runs.rank(torch.arange(plan.n_units, device=units.device)), norms.dtype)
    pull = force(distance.to(norms), size=runs.size, importance=runs.relative(norms)).to(norms)
    if kappa is None:
        kappa = (
            torch.ones_like(norms) if force.squared or force.elementwise else numbers_per_unit(plan).to(norms).sqrt()
        )
    arm = norms.square() if force.squared else norms
    if force.elementwise:
        arm = units.reduce(units.tensors(model), transform=torch.abs)
    return finite("the torque", kappa.to(norms) * runs.raise_zeros(pull) * arm, ())


def torque(model: nn.Module, plan: Plan) -> Tensor:
    """Torque with the linear force in index order (Torque: Gupta et al. 2024, eq. 9); otherwise as :func:`etp`.

    Returns:
        Scores, float [plan.n_units].

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: a parameter is not finite.
    """
    return torque_of(model, plan, Linear())
