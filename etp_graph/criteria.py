"""Criteria: model + plan -> one score per unit; the units with the lowest scores go first.

Every criterion reads the parameters (and gradients) of the model, changes nothing, and returns a float tensor
``[plan.n_units]`` on the model's device that is finite and not negative. Scores do not depend on the order of
slices, and follow a permutation of the units (but for ``random`` and the torque in index order, where the
position of a unit is what the score is about). Scores of locked groups are defined and mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .configured import some
from .errors import ScoreError
from .forces import Exponential, Force, Linear
from .plan import Plan
from .units import Runs, Units

Normalize = Literal["mean", "max", "sum", "none"]


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
        return _torque(model, plan, Exponential())
    distance = regularizer.distances()
    if distance.numel() != plan.n_units:
        raise ScoreError(
            f"etp: the regularizer knows {distance.numel()} units, the plan {plan.n_units}: "
            "pass the regularizer that was made with this plan."
        )
    return _torque(model, plan, regularizer.force, distance=distance, kappa=regularizer.kappa)


def torque(model: nn.Module, plan: Plan) -> Tensor:
    """Torque with the linear force in index order (Torque: Gupta et al. 2024, eq. 9); otherwise as :func:`etp`.

    Returns:
        Scores, float [plan.n_units].

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: a parameter is not finite.
    """
    return _torque(model, plan, Linear())


def magnitude(model: nn.Module, plan: Plan, *, p: float = 2, normalize: Normalize = "mean") -> Tensor:
    """Group norm (Σ_s Σ |w_s,u|^p)^(1/p) over all slices of a unit (Li et al. 2017; group-wise: Fang et al. 2023).

    Args:
        model: the model that the plan was traced from.
        plan: the plan.
        p: order of the norm, positive and finite: 1, 2, ...
        normalize: divide the scores of each group by their ``"mean"``, ``"max"`` or ``"sum"``, so that groups of
            different width can be compared, or ``"none"``. A group of zeros stays zero.

    Returns:
        Scores, float [plan.n_units].

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: a parameter is not finite, or an argument is out of range.
    """
    if isinstance(p, bool) or not 0 < p < float("inf"):
        raise ScoreError(f"magnitude: p={p!r}; the order of a norm is positive and finite.")
    units = _units(model, plan)
    with torch.no_grad():
        sums = units.reduce(units.tensors(model), transform=lambda w: w.abs().pow(p) if p != 1 else w.abs())
        scores = sums.pow(1 / p)
    return _normalize(_finite("magnitude", scores, units.tensors(model).items()), plan, normalize)


def bn_scale(model: nn.Module, plan: Plan) -> Tensor:
    """Mean |γ| over the batch norms that a unit passes through (Network Slimming: Liu et al. 2017).

    Returns:
        Scores, float [plan.n_units].

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: a scale is not finite, or units of a group that is not locked pass through no batch norm.
    """
    units = _units(model, plan)
    parameters = units.tensors(model)
    scales = {name: w for name, w in parameters.items() if name.endswith("weight") and _is_batch_norm(model, name)}
    with torch.no_grad():
        total = units.reduce(scales, transform=torch.abs)
        count = units.reduce({name: torch.ones_like(w) for name, w in scales.items()})
    _finite("bn_scale", total, scales.items())
    bare = [g.name for g, span in plan.spans() if g.locked is None and bool((count[span] == 0).any())]
    if bare:
        raise ScoreError(
            f"bn_scale: units of {some(bare)} pass through no batch norm with a scale. Use another criterion, "
            "or plan.lock({name: reason}) for these groups."
        )
    return total / count.clamp_min(1)


def taylor(model: nn.Module, plan: Plan) -> Tensor:
    """|Σ_s ⟨∇_s L, w_s,u⟩|, the first-order change of the loss when all slices of u are set to zero.

    Source: Molchanov et al. 2019, eq. 8, before squaring, with the sum over a unit's slices in all its layers.
    Run ``loss.backward()`` first, over as many batches as wanted: gradients add up in ``.grad``.

    Returns:
        Scores, float [plan.n_units].

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: a sliced parameter has no gradient, or a parameter or gradient is not finite.
    """
    units = _units(model, plan)
    parameters = units.tensors(model)
    needed = {s.tensor for group in plan.prunable for s in group.slices}
    missing = [name for name, w in parameters.items() if w.grad is None and name in needed]
    if missing:
        frozen = [name for name in missing if not parameters[name].requires_grad]
        remedy = f"set requires_grad on {some(frozen)} and run" if frozen else "run"
        raise ScoreError(
            f"taylor: {some(missing)} ha{'s' if len(missing) == 1 else 've'} no gradient: {remedy} "
            "loss.backward() before scoring (and score before optimizer.zero_grad())."
        )
    held = {name: (w, w.grad) for name, w in parameters.items() if w.grad is not None}
    with torch.no_grad():
        scores = units.reduce((name, _wide(w) * _wide(grad)) for name, (w, grad) in held.items()).abs()
    gradients = [(f"the gradient of {name}", grad) for name, (_, grad) in held.items()]
    return _finite("taylor", scores, [*((name, w) for name, (w, _) in held.items()), *gradients])


def random(model: nn.Module, plan: Plan, *, seed: int = 0) -> Tensor:
    """Uniform random scores in [0, 1): the control that every other criterion has to beat.

    Returns:
        Scores, float [plan.n_units]; the same for the same seed on every device.

    Raises:
        PlanError: the plan is not of this model.
    """
    units = _units(model, plan)
    return torch.rand(plan.n_units, generator=torch.Generator().manual_seed(seed), device="cpu").to(units.device)


CRITERIA: Mapping[str, Callable[..., Tensor]] = {
    "etp": etp,
    "torque": torque,
    "magnitude": magnitude,
    "bn_scale": bn_scale,
    "taylor": taylor,
    "random": random,
}
"""Every criterion of the library, by name."""


@torch.no_grad()
def _torque(
    model: nn.Module, plan: Plan, force: Force, *, distance: Tensor | None = None, kappa: Tensor | None = None
) -> Tensor:
    """κ·F(d)·‖w‖, or F(d)·‖w‖² for a force on squared norms, whose gradient grows with the norm."""
    units = _units(model, plan)
    runs = Runs.of(plan, units.device)
    norms = _finite("the torque", units.squares(units.tensors(model)).sqrt(), units.tensors(model).items())
    if distance is None:
        distance = runs.distance(runs.rank(torch.arange(plan.n_units, device=units.device)), norms.dtype)
    pull = force(distance.to(norms), size=runs.size, importance=runs.relative(norms)).to(norms)
    if kappa is None:
        kappa = torch.ones_like(norms) if force.squared else units.sizes().to(norms).sqrt()
    scores = kappa.to(norms) * runs.fill(pull) * (norms.square() if force.squared else norms)
    return _finite("the torque", scores, ())


def _units(model: nn.Module, plan: Plan) -> Units:
    plan.check(model)
    return Units(model, plan)


def _wide(tensor: Tensor) -> Tensor:
    """At least float32, in which sums over many numbers are exact enough."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def _is_batch_norm(model: nn.Module, parameter: str) -> bool:
    return isinstance(model.get_submodule(parameter.rpartition(".")[0]), _BatchNorm)


def _finite(what: str, scores: Tensor, inputs: Iterable[tuple[str, Tensor]]) -> Tensor:
    """The scores, detached, or :class:`ScoreError` naming the inputs that spoil them."""
    scores = scores.detach()
    if bool(scores.isfinite().all()):
        return scores
    bad = [name for name, value in inputs if not bool(value.isfinite().all())]
    if bad:
        raise ScoreError(
            f"{what}: {some(bad)} contain{'s' if len(bad) == 1 else ''} NaN or infinite values: repair them."
        )
    raise ScoreError(
        f"{what}: the scores overflow {scores.dtype}, though every weight is finite: scale the weights down."
    )


def _normalize(scores: Tensor, plan: Plan, how: Normalize) -> Tensor:
    if how not in ("mean", "max", "sum", "none"):
        raise ScoreError(f"magnitude: normalize={how!r}; choose 'mean', 'max', 'sum' or 'none'.")
    if how == "none":
        return scores
    parts = [scores[span] for _, span in plan.spans()]
    parts = [part for part in parts if part.numel()]
    measures: dict[str, Callable[[Tensor], Tensor]] = {"mean": Tensor.mean, "max": Tensor.max, "sum": Tensor.sum}
    totals = [measures[how](part) for part in parts]
    divisors = torch.stack(totals) if totals else scores.new_zeros(0)
    per_unit = divisors.repeat_interleave(torch.tensor([len(part) for part in parts], device=scores.device))
    return scores / per_unit.clamp_min(torch.finfo(scores.dtype).tiny)
