"""Settings of a regularizer (everything but the model, the plan and its state), as a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from etp_graph import forces, schedules
from etp_graph._config import (
    LATER,
    Composed,
    before,
    require,
    require_choice,
    require_count,
    require_number,
    show_fields,
)
from etp_graph.budget import Budget
from etp_graph.errors import ForceError, PlanError
from etp_graph.forces import Force
from etp_graph.plan import Plan
from etp_graph.schedules import Schedule

Mode = Literal["prox", "gradient", "loss", "mask"]

Order = Literal["index", "random", "importance"]

Kappa = Literal["sqrt", "one", "mean"]

Part = Literal["units", "losers"]

ChosenBy = Literal["need", "need-taylor", "taylor", "criterion"]

Beta = float | Literal["auto"]

FORMAT = 1

_MOST_STEPS = 10**12

_EXPONENTIAL = forces.Exponential()


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ForceSettings(Composed):
    """Settings that a :class:`etp_graph.methods.Method` shares with the regularizer that it makes.

    Attributes:
        beta: β ≥ 0, the strength. With ``"auto"`` each step computes β, so that enough units are at zero for the budget
            at the end, see :ref:`steering`.
        order: the ranking ρ that defines the distance: ``"index"`` (the pivot is unit 0, as in the papers),
            ``"random"``, or ``"importance"`` (by group norm; the pivot is the unit with the largest norm). Blocks of a
            group are ranked separately.
        refresh_every: rank the units again after this many steps; only with ``order="importance"``. 0: never after
            attaching.
        mode: ``"prox"``: after each optimizer step w_u <- w_u·max(0, 1 − η_eff β κ F/‖w_u‖), with
            η_eff = lr·(1 − dampening)/(1 − momentum) of the parameter group that holds the slice. This is decoupled
            from the optimizer, and units reach exact zeros. ``"gradient"``: the gradient of the penalty is added to
            ``.grad`` before the step (Torque eq. 11-13). ``"loss"``: the user adds the penalty to the loss (ETP
            eq. 10). ``"mask"``, only with ``beta="auto"``: no force acts; the losers are set to zero at once and held
            there (gradual pruning: Zhu & Gupta 2017).
        kappa: κ_g. ``"sqrt"``: the square root of the number of elements of a unit. ``"mean"``: the mean norm of the
            group's units when the regularizer is made, so that the force has the same effect on groups of any scale.
            ``"one"``: 1. Forces on squared norms or on single elements always use 1.
        every: apply the force once in this many steps, with the force of all of them (``prox`` and ``gradient``).
        seed: seed of the random order.
        chosen_by: score that chooses the losers with ``beta="auto"``. ``"need"``: norm divided by the pull.
            ``"taylor"``: effect on the loss, from the gradients of training. ``"need-taylor"``: both.
            ``"criterion"``: the criterion of the method, or the function that
            :meth:`etp_graph.Regularizer.choose_losers_by` was given. See :ref:`steering`.
        need_force: F in the need that chooses the losers with ``beta="auto"``, if another one than that which pushes
            them. ``None``: the same force.

    Raises:
        ForceError: a value is out of range, or values contradict each other.
    """

    beta: Beta = 1e-4
    order: Order = "index"
    refresh_every: int = 0
    mode: Mode = "prox"
    kappa: Kappa = "sqrt"
    every: int = 1
    seed: int = 0
    chosen_by: ChosenBy = "need"
    need_force: Force | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        if self.beta != "auto":
            require_number("beta", self.beta, 0, why="or 'auto'")
        require_choice("order", self.order, get_args(Order))
        require_choice("mode", self.mode, get_args(Mode))
        require_choice("kappa", self.kappa, get_args(Kappa))
        require_choice("chosen_by", self.chosen_by, get_args(ChosenBy))
        require(
            self.need_force is None or isinstance(self.need_force, Force),
            f"need_force={self.need_force!r}; pass one such as forces.exponential() (with parentheses).",
        )
        require_count("refresh_every", self.refresh_every, 0)
        require_count("every", self.every, 1)
        require(isinstance(self.seed, int), f"seed={self.seed!r}; it must be an integer.")
        require(
            self.refresh_every == 0 or self.order == "importance",
            f"refresh_every={self.refresh_every} with order={self.order!r}: only the order 'importance' ever changes.",
        )
        require(
            self.every == 1 or self.mode != "loss",
            f"every={self.every} with mode='loss': the loss is the user's; add penalty() as often as it should act.",
        )

    def shared(self) -> dict[str, Any]:
        """Return these settings by name, without those of the subclass."""
        return {f.name: getattr(self, f.name) for f in fields(ForceSettings)}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RegularizerSettings(ForceSettings):
    """Settings of a :class:`etp_graph.Regularizer`: those of ``ForceSettings``, and these.

    Attributes:
        force: F, see :mod:`etp_graph.forces`.
        schedule: s(t) with t = step/steps, see :mod:`etp_graph.schedules`; default: constant. With ``beta="auto"`` it
            gives the share of the final saving; default: cubic. The share of the phase after which the cubic schedule
            ends is the share of the cost to remove, but at least 20 % and at most 80 %.
        steps: number of optimizer steps of the phase; required by a schedule and by ``beta="auto"``.
        budget: the budget that ``beta="auto"`` meets, see :ref:`steering`; not a time.
        acts_on: ``"units"``: the force acts on all units. ``"losers"``, only with ``beta="auto"``: it acts only on
            units that must be at zero at the end of the present interval.

    Raises:
        ForceError: a value is out of range, or values contradict each other.
    """

    readers: ClassVar = {
        "force": forces.from_json, "need_force": forces.from_json, "schedule": schedules.from_json,
        "budget": Budget.from_json,
    }  # fmt: skip

    force: Force = field(default=_EXPONENTIAL, metadata=before("beta"))
    schedule: Schedule | None = field(default=None, metadata=before("chosen_by"))
    steps: int | None = field(default=None, metadata=before("chosen_by"))
    budget: Budget | None = field(default=None, metadata=before("chosen_by"))
    acts_on: Part = field(default="units", metadata=before("chosen_by"))

    @property
    def steered(self) -> bool:
        """Return True if β is computed from the budget."""
        return self.beta == "auto"

    def __post_init__(self) -> None:
        ForceSettings.__post_init__(self)  # super() fails in a dataclass with slots
        require(
            isinstance(self.force, Force),
            f"force={self.force!r}; pass one such as forces.exponential() (with parentheses).",
        )
        require_choice("acts_on", self.acts_on, get_args(Part))
        require(
            self.mode != "prox" or not self.force.elementwise,
            f"force={self.force.name!r} acts on single numbers, which no shrinking of units does: use mode='gradient' "
            "or 'loss'.",
        )
        self._check_schedule()
        self._check_steered() if self.steered else self._check_fixed()

    def _check_schedule(self) -> None:
        require(
            self.schedule is None or isinstance(self.schedule, Schedule),
            f"schedule={self.schedule!r}; pass one such as schedules.cubic() (with parentheses).",
        )
        if self.steps is not None:
            require_count("steps", self.steps, 1)
        require(
            self.schedule is None or self.steps is not None,
            "a schedule goes by step / steps: pass steps, the number of optimizer steps of the phase.",
        )

    def _check_fixed(self) -> None:
        require(self.budget is None, "budget= is what beta='auto' steers to; a fixed strength has no use for it.")
        require(
            self.acts_on == "units",
            f"acts_on={self.acts_on!r} with a fixed strength: only with beta='auto' are losers known.",
        )
        require(
            self.chosen_by == "need" and self.need_force is None,
            f"chosen_by={self.chosen_by!r}, need_force={self.need_force} with a fixed strength: only with beta='auto' "
            "are losers chosen.",
        )
        require(
            self.mode != "mask",
            "mode='mask' with a fixed strength: only with beta='auto' are there losers to set to zero.",
        )

    def _check_steered(self) -> None:
        require(
            isinstance(self.budget, Budget) and self.steps is not None,
            "beta='auto' steers to a budget by the end of a phase: pass budget=etp.Budget(...) and steps, the number "
            "of optimizer steps of the phase.",
        )
        assert self.budget is not None
        require(
            not self.budget.measured,
            f"beta='auto' with {self.budget.as_given}: no time can be measured in every step. Give the regularizer a "
            "budget in MACs or parameters.",
        )
        require(
            self.mode in ("prox", "mask") and self.every == 1 and self.refresh_every == 0,
            f"beta='auto' with mode={self.mode!r}, every={self.every}, refresh_every={self.refresh_every}: it takes "
            "units to zero, which only mode='prox' and mode='mask' can, in every step, and it ranks anew by itself.",
        )
        for force in (self.force, self.need_force or self.force):
            require(
                not force.squared and not force.adaptive and not force.elementwise,
                f"beta='auto' with force {force.name!r}: a force on squared norms or on single numbers takes no unit "
                "to zero as a whole, and one that changes with the weights has no strength of its own. Use "
                "exponential, linear, heaviside or uniform.",
            )

    def require_equal(self, other: Mapping[str, Any]) -> None:
        """Raise :class:`ForceError` if ``other`` (from ``to_dict``) differs; the message names every such field."""
        mine = self.describe()
        other = {**other, **_fields_of_budget(other)}
        mine = {**mine, **_fields_of_budget(mine)}
        differ = [
            f"{k}: {other.get(k)!r:.80}, here {mine.get(k)!r:.80}"
            for k in {**mine, **other}
            if not _equal(other.get(k), mine.get(k))
        ]
        if differ:
            raise ForceError(f"the state was saved with other settings ({'; '.join(differ)}): use the same ones.")


def _fields_of_budget(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the budget by name, in place of the budget, so that a message can name those that differ."""
    budget = settings.get("budget")
    if not isinstance(budget, Mapping):
        return {}
    return {"budget": None, **{f"budget.{name}": value for name, value in budget.items()}}


def _equal(found: object, mine: object) -> bool:
    """Compare two values of settings; a damaged state may hold anything."""
    try:
        return bool(found == mine)
    except (RuntimeError, TypeError, ValueError):
        return False


show_fields(RegularizerSettings)(RegularizerSettings.__init__)


def read_state(state: Mapping[str, Any], plan: Plan, settings: RegularizerSettings) -> tuple[int, Tensor, Tensor]:
    """Return the number of steps, the distances and the pending force, both [n_units], of a regularizer's state.

    Raises:
        PlanError: the state belongs to another plan.
        ForceError: this is not a state, or it has another format, is damaged, or was saved with other settings.
    """
    needed = {"format", "plan", "settings", "steps_done", "distance", "pending"}
    missing = needed - set(state) if isinstance(state, Mapping) else needed
    if missing or type(state["format"]) is not int or state["format"] != FORMAT:
        raise ForceError(f"this is not a regularizer's state of format {FORMAT}; missing: {sorted(missing)}.")
    if not isinstance(state["settings"], Mapping) or not isinstance(state["plan"], str):
        raise ForceError("this state is damaged: it names no plan or no settings. Restore it from a copy.")
    if state["plan"] != plan.fingerprint:
        raise PlanError("this state was saved with another plan; make the regularizer with that plan.")
    settings.require_equal(state["settings"])
    like, steps = torch.zeros(plan.n_units, device="cpu"), state["steps_done"]
    distance, pending = (checked_vector(state[name], name, like, exact=False) for name in ("distance", "pending"))
    if not isinstance(steps, int) or isinstance(steps, bool) or not 0 <= steps < _MOST_STEPS:
        raise ForceError(f"this state is damaged: steps_done={steps!r:.50} is no number of steps.")
    if bool((distance < 0).any()) or bool((distance > 1).any()) or bool((pending < 0).any()):
        raise ForceError("this state is damaged: distances lie in [0, 1], and a pending force is not negative.")
    return steps, distance, pending


def checked_vector(value: object, name: str, like: Tensor, *, exact: bool = True) -> Tensor:
    """Return a copy of a vector of a state, on the device of ``like``.

    Raises:
        ForceError: this is not a finite vector with the shape and dtype of ``like``. Without ``exact``, numbers of any
            floating-point type will do, also in a list.
    """
    found = value
    if not exact and not isinstance(value, Tensor):
        try:
            found = torch.as_tensor(value, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError):
            found = None
    sound = isinstance(found, Tensor) and found.shape == like.shape and found.layout == torch.strided
    if sound and isinstance(found, Tensor) and not found.is_meta:
        typed = found.dtype == like.dtype if exact else found.is_floating_point()
        if typed and bool(found.isfinite().all()):
            return found.detach().to(like.device, copy=True)
    raise ForceError(f"this state is damaged: {name} has to be a finite vector, {like.dtype} {list(like.shape)}.")
