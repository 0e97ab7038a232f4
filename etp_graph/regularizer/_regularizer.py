"""The regularizer: a force on every slice of every unit, applied in the user's own training loop."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from etp_graph.budget import Budget
from etp_graph.errors import ForceError, PlanError
from etp_graph.forces import Exponential, Force
from etp_graph.model import after_gradients, inner_optimizer
from etp_graph.plan import Plan
from etp_graph.schedules import Schedule
from etp_graph.units import Units

from ._binding import Binding, maximum, prox_factors, step_size
from ._pull import Pull
from ._settings import FORMAT, Beta, ChosenBy, Kappa, Mode, Order, Part, RegularizerSettings, checked_vector, read_state
from ._steering import Steering

_EXPONENTIAL = Exponential()


class Regularizer:
    """Drives units to zero while a model trains: penalty β·s(t)·Σ_g κ_g Σ_u F(d_u)·‖w_u‖ (ETP eq. 10).

    Units of locked groups feel no force. Nor do units with a frozen slice (``requires_grad`` is False): they cannot
    become zero as a whole, so removing them would change the output; ``attach`` warns about them.

    Args:
        model: the model that the plan was traced from, not a wrapper of it (DDP, ``torch.compile``).
        plan: the plan.
        force: F, see :mod:`etp_graph.forces`.
        beta: β ≥ 0, the strength; or ``"auto"``: as strong as it takes to have enough units at zero for the budget.
        order: the ranking ρ behind the distance: ``"index"`` (pivot 0, the papers'), ``"random"``, or
            ``"importance"`` (by group norm; the pivot is the largest). Blocks of a group are ranked separately.
        refresh_every: rank anew after this many steps; only with ``order="importance"``; 0: never after attaching.
        mode: ``"prox"``: after each optimizer step w_u <- w_u·max(0, 1 − η_eff β κ F/‖w_u‖), with
            η_eff = lr·(1 − dampening)/(1 − momentum) of each parameter's own group: decoupled from the optimizer,
            ends in exact zeros. ``"gradient"``: added to ``.grad`` before the step (Torque eq. 11-13).
            ``"loss"``: the user adds :meth:`penalty` to the loss (ETP eq. 10).
        kappa: κ_g: ``"sqrt"`` of the numbers per unit; ``"mean"`` norm of the group's units when the regularizer is
            made, so that groups of any scale are pushed alike; or ``"one"``, which all but forces on plain norms take.
        every: apply the force of this many steps at once (``prox`` and ``gradient``).
        seed: of the random order.
        schedule: s(t) with t = step/steps, see :mod:`etp_graph.schedules`; default: constant. With ``beta="auto"``
            the share of the way to the budget; default: cubic; it ends after as large a share of the phase
            as has to go of the cost, but within 20 and 80 %.
        steps: number of optimizer steps of the phase; needed by a schedule and by ``beta="auto"``.
        budget: what ``beta="auto"`` steers to, see :mod:`etp_graph.steering`; in MACs or parameters.
        acts_on: ``"units"``, or, with ``beta="auto"``, ``"losers"``: only those that have to be at zero soon.
        chosen_by: what makes losers: ``"need"``, their norm over the pull; ``"taylor"``, what they do to the loss, from
            the gradients of training; or ``"need-taylor"``, both. See :mod:`etp_graph.steering`.

    Raises:
        ForceError: an argument is out of range.
        PlanError: the plan is not of this model, or has no group that may be pruned.
        BudgetError: the budget is out of reach.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        *,
        force: Force = _EXPONENTIAL,
        beta: Beta = 1e-4,
        order: Order = "index",
        refresh_every: int = 0,
        mode: Mode = "prox",
        kappa: Kappa = "sqrt",
        every: int = 1,
        seed: int = 0,
        schedule: Schedule | None = None,
        steps: int | None = None,
        budget: Budget | None = None,
        acts_on: Part = "units",
        chosen_by: ChosenBy = "need",
    ) -> None:
        self.settings = RegularizerSettings(
            force=force, beta=beta, order=order, refresh_every=refresh_every, mode=mode, kappa=kappa,
            every=every, seed=seed, schedule=schedule, steps=steps, budget=budget, acts_on=acts_on,
            chosen_by=chosen_by,
        )  # fmt: skip
        plan.check(model)
        if not plan.prunable:
            raise PlanError("no group of this plan may be pruned, so there is nothing to drive to zero; print(plan).")
        self.model, self.plan = model, plan
        self.steps_done, self.penalties = 0, 0
        self._units = Units(model, plan, locked=False)
        self._binding = Binding(model, plan, self._units)
        self._pending = torch.zeros(plan.n_units, dtype=self._units.dtype, device=self._units.device)
        self._optimizer: Optimizer | None = None
        self._handles: list[Any] = []
        self._pull = Pull(plan, self.settings, self._units, self._binding)
        self._pull.check()
        self._steering = Steering(model, plan, self.settings, self._pull) if self.settings.steered else None

    # What acts on which unit.
    @property
    def force(self) -> Force:
        """The force F."""
        return self.settings.force

    @property
    def kappa(self) -> Tensor:
        """κ of the group of each unit, [n_units]."""
        return self._pull.kappa

    @property
    def strength(self) -> float:
        """β·s(t) at the present step; with ``beta="auto"`` that of the last one, which a CPU has to wait for."""
        if self._steering is not None:
            most = float(maximum(list(self._sizes().values())))
            return float(self._steering.push) / most if most else 0.0
        assert not isinstance(self.settings.beta, str)
        schedule, steps = self.settings.schedule, self.settings.steps
        if schedule is None or steps is None:
            return self.settings.beta
        return self.settings.beta * schedule(min(1.0, self.steps_done / steps))

    def distances(self) -> Tensor:
        """Distance d_u of each unit from the pivot of its group (or block), in [0, 1], shape [n_units]."""
        return self._pull.distance.clone()

    def forces(self) -> Tensor:
        """F(d_u), zero where no force acts (locked groups, frozen slices), shape [n_units]."""
        self._binding.refresh()
        return self._pull.force() * self._binding.active

    def penalty(self) -> Tensor:
        """β·s(t)·Σ_u κ F(d_u)·‖w_u‖ (or F/2·‖w_u‖²), differentiable, a scalar; add it to the loss with ``mode="loss"``.

        The force is a constant under differentiation, and a unit at zero has gradient zero. A loss that is divided
        for gradient accumulation divides this term, too.
        """
        self._binding.refresh()
        self.penalties += 1
        squares = self._units.reduce(self._binding.tensors, transform=torch.square)
        pull = self._pull(squares.detach().sqrt()) * self.strength
        if self.force.squared:
            return (pull * squares).sum() / 2
        if self.force.elementwise:
            return (pull * self._units.reduce(self._binding.tensors, transform=torch.abs)).sum()
        positive = squares > 0  # the square root has an infinite slope at zero, and 0·inf is NaN
        return (pull * torch.where(positive, squares, 1.0).sqrt() * positive).sum()

    # Life in a training loop.
    def attach(self, optimizer: Optimizer) -> Regularizer:
        """Apply the force in every ``optimizer.step()`` from now on; returns itself, also for use in ``with``.

        With ``mode="loss"`` this only counts steps, which schedules and ``refresh_every`` go by.

        Raises:
            ForceError: already attached, not a :class:`torch.optim.Optimizer`, or the optimizer lacks a parameter
                that the force has to act on.
            PlanError: the model no longer fits the plan.
        """
        optimizer = inner_optimizer(optimizer)
        if self._optimizer is not None:
            raise ForceError("this regularizer is already attached; detach() it first.")
        self.plan.check(self.model)
        self._binding.check()
        self._binding.refresh()
        self._binding.find_owners(optimizer)
        if self.settings.mode == "prox":
            self._sizes(optimizer)
        if self._binding.frozen:
            warnings.warn(self._binding.describe_frozen(), stacklevel=2)
        if self.steps_done == 0 and self.settings.order == "importance":
            self._pull.rank()
        self._optimizer = optimizer
        before = optimizer.register_step_pre_hook(self._before)
        self._handles = [before, optimizer.register_step_post_hook(self._after)]
        return self

    def detach(self) -> None:
        """Leave the optimizer as it was before :meth:`attach`. Does nothing if not attached."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizer = [], None

    def __enter__(self) -> Regularizer:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """Everything that an identical continuation needs: plain values and two tensors [n_units] on the CPU."""
        state: dict[str, Any] = {
            "format": FORMAT,
            "plan": self.plan.fingerprint,
            "settings": self.settings.to_dict(),
            "steps_done": self.steps_done,
            "distance": self._pull.distance.detach().cpu().clone(),
            "pending": self._pending.detach().cpu().clone(),
        }
        if self.settings.kappa == "mean":
            state["kappa"] = self.kappa.cpu().clone()
        if self._steering is not None:
            state |= {name: getattr(self._steering, name).cpu().clone() for name in ("losers", "sensitivity")}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            PlanError: the state belongs to another plan.
            ForceError: it is not a state, of another format, or of a regularizer with other settings.
        """
        self.steps_done, distance, pending = read_state(state, self.plan, self.settings)
        self._pull.set_distance(distance.to(self._pending, copy=True))
        self._pending = pending.to(self._pending, copy=True)
        if self.settings.kappa == "mean":
            self._pull.set_kappa(checked_vector(state.get("kappa"), "kappa", self._pending))
        if self._steering is not None:
            for name in ("losers", "sensitivity"):
                setattr(self._steering, name, checked_vector(state.get(name), name, getattr(self._steering, name)))

    # One step.
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-step hook: the checks, before anything has changed, and what adds to gradients or looks at them."""
        self._binding.check()
        if self._binding.refresh():
            self._binding.find_owners(optimizer)
        if self._steering is not None:
            act = self._steering.observe if self._steering.observes(self.steps_done) else None
        else:
            act = self._add_gradient if self.settings.mode == "gradient" and self._due() else None
        return None if act is None else after_gradients(act, optimizer, args, kwargs)

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Post-step hook: the force of the mode ``prox``, and the count of steps."""
        if self._steering is not None:
            self._steer(optimizer, self._steering)
        elif self.settings.mode == "prox":
            self._shrink(optimizer)
        self.steps_done += 1
        if self.settings.refresh_every and self.steps_done % self.settings.refresh_every == 0:
            self._pull.rank()

    def _sizes(self, optimizer: Optimizer | None = None) -> dict[int, float | Tensor]:
        """Step size of each parameter group that a force acts on; none while not attached."""
        groups = () if (found := optimizer or self._optimizer) is None else found.param_groups
        return {index: step_size(groups[index]) for index in set(self._binding.owner.values()) if groups}

    def _due(self) -> bool:
        return (self.steps_done + 1) % self.settings.every == 0

    @torch.no_grad()
    def _add_gradient(self, optimizer: Optimizer) -> None:
        """∇_u <- ∇_u + β κ F(d_u) w_u/‖w_u‖ (Torque eq. 11-13), zero for a unit at zero."""
        norms = self._pull.norms()
        pull = self._pull(norms) * (self.strength * self.settings.every)
        if not self.force.squared and not self.force.elementwise:
            pull = torch.where(norms > 0, pull / norms, 0.0)
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:  # a fused optimizer divides by GradScaler's factor itself, after this
            pull = pull * scale.to(pull)
        self._binding.add_gradient_(pull, signs=self.force.elementwise)

    @torch.no_grad()
    def _steer(self, optimizer: Optimizer, steering: Steering) -> None:
        """As :meth:`_shrink`, with the push that the budget asks for: all slices of a unit reach zero together."""
        ratio = steering.ratio(self.steps_done)
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is not None:
            ratio = ratio * (1 - skipped)
        self._binding.scale_(dict.fromkeys(self._sizes(optimizer), 1 - ratio))

    @torch.no_grad()
    def _shrink(self, optimizer: Optimizer) -> None:
        """w_u <- w_u·max(0, 1 − η_eff β κ F(d_u)/‖w_u‖), each slice with the η_eff of its own parameter group.

        The force waits in ``_pending`` until it is due and large enough for the weights' number format: a factor
        of 1 − 1e-4 would be rounded to 1 in bfloat16, and the force lost.
        """
        sizes = self._sizes(optimizer)
        most = maximum(list(sizes.values()))
        push: float | Tensor = self.strength * most
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is not None:  # a fused optimizer skips the step itself where gradients overflowed
            push = push * (1 - skipped)
        norms = self._pull.norms() if self._due() or self.force.squared or self.force.adaptive else None
        pull = self._pull(norms) * push
        self._pending += pull * norms if self.force.squared and norms is not None else pull
        if norms is None or not self._due() or (not isinstance(most, Tensor) and most == 0):
            return
        # The bounds keep 0·inf, which is NaN, out of units at zero and of parameter groups with lr = 0.
        ratio = (self._pending / norms.clamp_min(1e-30)).clamp_max(1e6)
        ripe = ratio >= self._binding.smallest_step()
        self._pending.masked_fill_(ripe, 0)
        self._binding.scale_(prox_factors(ratio, ripe, sizes))
