"""One scale for the strengths of all methods, so that the same few values can be tried for each.

A *push* p is dimensionless. With SGD the force of strength β moves the median unit, over the whole sparse phase, by p
times its norm if nothing opposes it: Σ_t η_eff(t) · β κ F = p ‖w‖. An optimizer that divides by the size of the
gradient (Adam) makes a force that enters through the gradient independent of β in that sense; there p is the ratio of
the force to the loss gradient of the median unit at the checkpoint. A proximal step is applied past the optimizer and
has the first meaning everywhere, with η_eff the learning rate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.contest.training import total_rate
from benchmarks.tasks.base import Task
from etp_graph import Plan, Regularizer
from etp_graph.methods import Method
from etp_graph.plan import numbers_per_unit
from etp_graph.units import Units

MOMENTUM = 0.9


def drift(task: Task) -> float:
    """Σ_t η_eff(t) of the sparse phase: η / (1 - momentum) for SGD, η for Adam."""
    total = total_rate(task.recipe.sparse_steps, task.recipe.sparse_rate)
    return total / (1 - MOMENTUM) if task.recipe.optimizer == "sgd" else total


def normalised(task: Task, mode: str) -> bool:
    """Whether the optimizer divides this force by the size of the gradient."""
    return task.recipe.optimizer == "adamw" and mode != "prox"


def reference(task: Task, model: nn.Module, plan: Plan, method: Method) -> float:
    """The β of the push 1 for a method of this library on this checkpoint."""
    found: Regularizer | None = method.regularizer(model, plan, steps=1)
    assert found is not None
    acting = drift(task) * mean_strength(task, method)
    acted = method.acted_on(model, plan)
    units = Units(model, acted)
    norms = units.square_norms(model).detach().sqrt()
    pull = (found.forces() * found.kappa).detach()
    if found.force.squared:
        pull = pull * norms
    if found.force.elementwise:
        pull = pull * numbers_per_unit(acted).to(pull).sqrt()  # the norm of F·sign(w) over the numbers of a unit
    if normalised(task, method.mode):
        return median_ratio(gradient_norms(task, model, units), pull)
    return median_ratio(norms, pull) / acting


def mean_strength(task: Task, method: Method) -> float:
    """The mean of s(t) over the sparse phase: a force that grows from nothing pushes less than one that is there."""
    steps = task.recipe.sparse_steps
    if method.strength is None:
        return 1.0
    mean = sum(method.strength((step + 1) / steps) for step in range(steps)) / steps
    return mean or 1.0


def gradient_norms(task: Task, model: nn.Module, units: Units) -> Tensor:
    """Norm of the loss gradient of each unit on the first batch, [n_units]."""
    gradients = gradients_of(task, model)
    return units.reduce({name: gradients[name] for name in units.axes}, transform=torch.square).sqrt()


def gradients_of(task: Task, model: nn.Module) -> dict[str, Tensor]:
    """The gradient of the loss on the first batch, by parameter. The model has none afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()  # running statistics stay as they are
    for module in model.modules():
        module.training = isinstance(module, nn.RNNBase)  # cuDNN differentiates these in training mode only
    torch.autograd.backward(task.loss(model, next(task.batches(seed=0, start=0, steps=1)), torch.Generator()))
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for module, mode in modes.items():
        module.training = mode
    return found


def median_ratio(value: Tensor, pull: Tensor) -> float:
    """The median of ``value / pull`` over the units on which a force acts."""
    acts = (pull > 0) & (value > 0)
    if not bool(acts.any()):
        raise ValueError("no force acts on any unit that is not zero, so no strength can be chosen")
    return float((value[acts] / pull[acts]).median())
