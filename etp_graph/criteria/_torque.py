"""Torque of a unit: after convergence, proportional to the first-order change of the loss when it is removed."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from etp_graph.errors import ScoreError
from etp_graph.forces import Exponential, Force, Linear
from etp_graph.plan import Plan, numbers_per_unit
from etp_graph.units import Rankings

from ._common import finite, units_of
from ._registry import register_criterion


class Forced(Protocol):
    """Interface of a regularizer that the torque needs; :class:`etp_graph.Regularizer` implements it."""

    @property
    def force(self) -> Force:
        """Return the force F."""

    @property
    def kappa(self) -> Tensor:
        """Return κ of the group of each unit, [n_units]."""

    def distances(self) -> Tensor:
        """Return the distance d_u of each unit, [n_units]."""


@register_criterion("etp")
def etp(model: nn.Module, plan: Plan, *, regularizer: Forced | None = None) -> Tensor:
    """Return the torque κ_g·F(d_u)·‖w_u‖ of each unit (ETP: Modi et al. 2025, eq. 8-10).

    Times β, this is the first-order change of the loss when u is removed from a model that has converged under the
    penalty β Σ_g κ_g Σ_u F(d_u)·‖w_u‖. There ∇_u L = −β κ_g F(d_u) w_u/‖w_u‖, so that
    −⟨∇_u L, w_u⟩ = β κ_g F(d_u)·‖w_u‖.

    A unit without force (F = 0: the pivot of a linear force, units below the threshold of a step) gives no such
    estimate. It is scored with the smallest positive force of the units it is ranked with, because a score of zero
    would remove it first.

    Args:
        model: the model that the plan was traced from.
        plan: the plan.
        regularizer: the regularizer of the training; default: the exponential force in index order.

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
    """Return the torque κ·F(d)·⟨∇P(w), w⟩ of each unit, [n_units].

    P is the norm that the force acts on: ‖w‖, ‖w‖²/2 for a squared force, or ‖w‖₁ for an elementwise force.

    Args:
        model: the model that the plan was traced from.
        plan: the plan.
        force: F.
        distance: d of each unit, [n_units]; default: distances in index order.
        kappa: κ of each unit, [n_units]; default: the square root of the number of weights of the unit, or 1 for
            squared and elementwise forces.
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


@register_criterion("torque")
def torque(model: nn.Module, plan: Plan) -> Tensor:
    """Return the torque under the linear force in index order (Torque: Gupta et al. 2024, eq. 9), as :func:`etp`.

    Returns:
        Scores, float [plan.n_units].

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: a parameter is not finite.
    """
    return torque_of(model, plan, Linear())
