"""Regularizer that applies a force to every slice of every unit, in the user's own training loop."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from etp_graph._config import change_fields, show_fields
from etp_graph.errors import ForceError, PlanError
from etp_graph.forces import Force
from etp_graph.model import after_gradients
from etp_graph.plan import Plan
from etp_graph.surgery import rehearse_cut
from etp_graph.units import Units

from ._binding import Binding, Owner, maximum, prox_factors, step_size
from ._joint_steps import JointSteps, Optimizers, inner_optimizers
from ._pull import Pull
from ._settings import FORMAT, RegularizerSettings, checked_vector, read_state
from ._steering import LoserScore, Steering


class Regularizer:
    """Regularizer that shrinks units to zero during training: penalty β·s(t)·Σ_g κ_g Σ_u F(d_u)·‖w_u‖ (ETP eq. 10).

    No force acts on units of locked groups. No force acts on units with a frozen slice (``requires_grad`` is False)
    either. They cannot become zero as a whole, so removing them would change the output; ``attach`` warns about them.

    Args:
        model: the model that the plan was traced from, not a wrapper of it (DDP, ``torch.compile``).
        plan: the plan.
        settings: all settings as one object, such as one that ``RegularizerSettings.from_json`` read.
        values: fields of :class:`etp_graph.regularizer.RegularizerSettings` by name (``force=``, ``beta=``, ...). They
            replace those of ``settings``, or else the defaults.

    Raises:
        ForceError: a setting is unknown or out of range.
        PlanError: the plan was traced from another model, or every group is locked.
        BudgetError: the budget is out of reach.
    """

    @show_fields(RegularizerSettings)
    def __init__(
        self, model: nn.Module, plan: Plan, settings: RegularizerSettings | None = None, **values: Any
    ) -> None:
        self.settings = change_fields(settings or RegularizerSettings(), values)
        plan.check(model)
        if not plan.prunable:
            raise PlanError("no group of this plan may be pruned, so there is nothing to drive to zero; print(plan).")
        self.model, self.plan = model, plan
        self.steps_done, self.penalties = 0, 0
        self._units = Units(model, plan, locked=False)
        self._binding = Binding(model, plan, self._units)
        self._pending = torch.zeros(plan.n_units, dtype=self._units.dtype, device=self._units.device)
        self._steps: JointSteps | None = None
        self._gradient: Tensor | None = None
        self._pull = Pull(plan, self.settings, self._units, self._binding)
        self._pull.check()
        self._steering = Steering(model, plan, self.settings, self._pull) if self.settings.steered else None

    # Forces and penalty.
    @property
    def force(self) -> Force:
        """Return the force F."""
        return self.settings.force

    @property
    def kappa(self) -> Tensor:
        """Return κ of the group of each unit, [n_units]."""
        return self._pull.kappa

    @property
    def strength(self) -> float:
        """Return β·s(t) at the present step.

        With ``beta="auto"`` return the β of the last step. The CPU then waits for the device.
        """
        if self._steering is not None:
            most = float(maximum(list(self._sizes().values())))
            return float(self._steering.push) / most if most else 0.0
        assert not isinstance(self.settings.beta, str)
        schedule, steps = self.settings.schedule, self.settings.steps
        if schedule is None or steps is None:
            return self.settings.beta
        return self.settings.beta * schedule(min(1.0, self.steps_done / steps))

    def distances(self) -> Tensor:
        """Return the distance d_u of each unit from the pivot of its group (or block), in [0, 1], shape [n_units]."""
        return self._pull.distance.clone()

    def set_distances(self, distance: Tensor) -> None:
        """Set the distance of each unit, in [0, 1], [n_units]; for methods that choose the units themselves (GReg)."""
        self._pull.set_distance(distance.to(self._pending, copy=True))

    def choose_losers_by(self, score: LoserScore, *, effects: bool = False) -> Regularizer:
        """Choose the losers by a score of your own, with ``chosen_by="criterion"``; return the regularizer.

        Units of low score are taken to zero first. The score is asked for at the start of each interval, about 50 times
        in a phase. Units that are at zero stay there, whatever it says.

        Args:
            score: function of the effects on the loss, float64 [n_units], that returns scores, float [n_units].
            effects: observe the effects on the loss: the root of the running mean of the squared first-order change of
                the loss if the unit is removed. Otherwise the function gets zeros.

        Raises:
            ForceError: losers are not chosen by a criterion.
        """
        if self._steering is None or self.settings.chosen_by != "criterion":
            raise ForceError(
                f"beta={self.settings.beta!r}, chosen_by={self.settings.chosen_by!r}: no criterion chooses the losers. "
                "Use beta='auto' and chosen_by='criterion'."
            )
        self._steering.choose_by(score, effects=effects)
        return self

    def forces(self) -> Tensor:
        """Return F(d_u), zero where no force acts (locked groups, frozen slices), shape [n_units]."""
        self._binding.refresh()
        return self._pull.force() * self._binding.active

    def penalty(self) -> Tensor:
        """Return β·s(t)·Σ_u κ F(d_u)·‖w_u‖, a differentiable scalar; add it to the loss with ``mode="loss"``.

        ‖w_u‖ is replaced by ‖w_u‖²/2 or ‖w_u‖₁ for forces on squared norms or on single elements. The force is a
        constant in differentiation, and a unit at zero has gradient zero. Add the penalty before the loss is divided
        for gradient accumulation, so that it is divided too.
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

    # Use in a training loop.
    def attach(self, optimizer: Optimizers, *, rehearse_surgery: bool = True) -> Regularizer:
        """Apply the force in every ``optimizer.step()`` from now on. Return the regularizer, for use in ``with``.

        With ``mode="loss"`` this only counts steps, for schedules and ``refresh_every``.

        Args:
            optimizer: the optimizer that trains the model, or a list of several that share its parameters. A step is
                then over when each of them has stepped.
            rehearse_surgery: warn if surgery will not be able to cut the states of the optimizer. Set it to False if
                surgery will go without the optimizer.

        Raises:
            ForceError: the regularizer is already attached, ``optimizer`` is not a :class:`torch.optim.Optimizer`, or
                it lacks a parameter that the force has to act on.
            PlanError: the model no longer fits the plan.
        """
        optimizers = inner_optimizers(optimizer)
        if self._steps is not None:
            raise ForceError("this regularizer is already attached; detach() it first.")
        self.plan.check(self.model)
        self._binding.check()
        self._binding.refresh()
        self._binding.find_owners(optimizers)
        if self.settings.mode == "prox":
            self._sizes(optimizers)
        if self._binding.frozen:
            warnings.warn(self._binding.describe_frozen(), stacklevel=2)
        for reason in rehearse_cut(optimizers) if rehearse_surgery else ():
            warnings.warn(f"surgery after this training will refuse its optimizer: {reason}", stacklevel=2)
        if self.steps_done == 0 and self.settings.order == "importance":
            self._pull.rank()
        self._steps = JointSteps(optimizers, begin=self._begin, before=self._before, end=self._after)
        return self

    def detach(self) -> None:
        """Remove the hooks that :meth:`attach` added to the optimizer. Does nothing if not attached."""
        if self._steps is not None:
            self._steps.remove()
        self._steps, self._gradient = None, None

    def __enter__(self) -> Regularizer:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that an exact continuation needs: plain values, and tensors [n_units] on the CPU."""
        state: dict[str, Any] = {
            "format": FORMAT,
            "plan": self.plan.fingerprint,
            "settings": self.settings.describe(),
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
        """Continue from a state that :meth:`state_dict` returned.

        Raises:
            PlanError: the state belongs to another plan.
            ForceError: this is not a state, or it has another format, is damaged, or was saved with other settings.
                Nothing has changed then.
        """
        steps, distance, pending = read_state(state, self.plan, self.settings)
        kappa = checked_vector(state.get("kappa"), "kappa", self._pending) if self.settings.kappa == "mean" else None
        held = {name: getattr(self._steering, name) for name in ("losers", "sensitivity") if self._steering is not None}
        steered = {name: checked_vector(state.get(name), name, like) for name, like in held.items()}
        self.steps_done = steps  # everything is checked
        self.set_distances(distance)
        self._pending = pending.to(self._pending, copy=True)
        if kappa is not None:
            self._pull.set_kappa(kappa)
        for name, value in steered.items():
            setattr(self._steering, name, value)

    # Hooks of one step of all optimizers.
    def _begin(self) -> None:
        """Check the parameters before the step changes anything."""
        self._binding.check()
        if self._binding.refresh():
            self._binding.find_owners(self._optimizers)
        self._gradient = None

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add the force to the gradients of one optimizer, or observe them."""
        if self._steering is not None:
            act = self._observe if self._steering.observes(self.steps_done) else None
        else:
            act = self._add_gradient if self.settings.mode == "gradient" and self._due() else None
        return None if act is None else after_gradients(act, optimizer, args, kwargs)

    def _after(self) -> None:
        """Apply the force of the mode ``prox`` after the step, count the step, and rank the units again if due."""
        if self._steering is not None:
            self._steer(self._steering)
        elif self.settings.mode == "prox":
            self._shrink()
        self.steps_done += 1
        if self.settings.refresh_every and self.steps_done % self.settings.refresh_every == 0:
            self._pull.rank()

    @property
    def _optimizers(self) -> tuple[Optimizer, ...]:
        return () if self._steps is None else self._steps.optimizers

    def _sizes(self, optimizers: tuple[Optimizer, ...] | None = None) -> dict[Owner, float | Tensor]:
        """Return the step size of each parameter group on which a force acts; empty while not attached."""
        held = self._optimizers if optimizers is None else optimizers
        owners = dict.fromkeys(self._binding.owner.values()) if held else {}
        return {(which, group): step_size(held[which].param_groups[group], held[which]) for which, group in owners}

    def _names_of(self, optimizer: Optimizer) -> list[str] | None:
        """Return the names of the parameters that one optimizer steps; ``None`` if there is no other optimizer."""
        if len(self._optimizers) == 1:
            return None
        which = next(i for i, one in enumerate(self._optimizers) if one is optimizer)
        return [name for name, (held_by, _) in self._binding.owner.items() if held_by == which]

    def _share_taken(self) -> float | Tensor:
        """Return 0 if a fused optimizer skipped its step because gradients overflowed, else 1."""
        flags = [getattr(one, "found_inf", None) for one in self._optimizers]
        return 1 - maximum([flag for flag in flags if flag is not None])

    def _due(self) -> bool:
        return (self.steps_done + 1) % self.settings.every == 0

    def _observe(self, optimizer: Optimizer) -> None:
        assert self._steering is not None
        names = self._names_of(optimizer)
        if names is None or names:
            self._steering.observe(optimizer, names)

    @torch.no_grad()
    def _add_gradient(self, optimizer: Optimizer) -> None:
        """Add the force: ∇_u <- ∇_u + β κ F(d_u) w_u/‖w_u‖ (Torque eq. 11-13); add nothing for a unit at zero.

        All optimizers take the force of the weights from before the first of them stepped.
        """
        if self._gradient is None:
            norms = self._pull.norms()
            pull = self._pull(norms) * (self.strength * self.settings.every)
            plain = self.force.squared or self.force.elementwise
            self._gradient = pull if plain else torch.where(norms > 0, pull / norms, 0.0)
        pull, scale = self._gradient, getattr(optimizer, "grad_scale", None)
        if scale is not None:  # a fused optimizer divides by GradScaler's factor later, in its own step
            pull = pull * scale.to(pull)
        self._binding.add_gradient_(pull, signs=self.force.elementwise, names=self._names_of(optimizer))

    @torch.no_grad()
    def _steer(self, steering: Steering) -> None:
        """Shrink units as the budget requires. All slices of a unit have one ratio, so they reach zero together."""
        ratio = steering.ratio(self.steps_done) * self._share_taken()
        self._binding.scale_(dict.fromkeys(self._sizes(), 1 - ratio))

    @torch.no_grad()
    def _shrink(self) -> None:
        """Apply w_u <- w_u·max(0, 1 − η_eff β κ F(d_u)/‖w_u‖), with the η_eff of the slice's parameter group.

        The force is summed in ``_pending`` until it is due and large enough for the number format of the weights.
        Otherwise it could be lost: bfloat16 rounds a factor of 1 − 1e-4 to 1.
        """
        sizes = self._sizes()
        most = maximum(list(sizes.values()))
        push = self.strength * most * self._share_taken()
        norms = self._pull.norms() if self._due() or self.force.squared or self.force.adaptive else None
        pull = self._pull(norms) * push
        self._pending += pull * norms if self.force.squared and norms is not None else pull
        if norms is None or not self._due() or (not isinstance(most, Tensor) and most == 0):
            return
        # Without the bounds, 0·inf would give NaN for units at zero and for parameter groups with lr = 0.
        ratio = (self._pending / norms.clamp_min(1e-30)).clamp_max(1e6)
        ripe = ratio >= self._binding.smallest_step()
        self._pending.masked_fill_(ripe, 0)
        self._binding.scale_(prox_factors(ratio, ripe, sizes))
