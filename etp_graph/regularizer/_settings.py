"""Settings of a regularizer (everything but the model, the plan and its state), as a configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from etp_graph import forces, schedules
from etp_graph._config import Composed, is_number, require
from etp_graph.budget import Budget
from etp_graph.errors import ForceError, PlanError
from etp_graph.forces import Force
from etp_graph.plan import Plan
from etp_graph.schedules import Schedule

Mode = Literal["prox", "gradient", "loss"]

Order = Literal["index", "random", "importance"]

Kappa = Literal["sqrt", "one", "mean"]

Part = Literal["units", "losers"]

ChosenBy = Literal["need", "need-taylor", "taylor"]

Beta = float | Literal["auto"]

FORMAT = 1

_EXPONENTIAL = forces.Exponential()


def _count(name: str, value: object, least: int) -> None:
    require(
        isinstance(value, int) and not isinstance(value, bool) and value >= least,
        f"{name}={value!r}; it must be an integer of at least {least}.",
    )


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{name}={value!r}; choose one of {', '.join(map(repr, choices))}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RegularizerSettings(Composed):
    """Arguments of :class:`etp_graph.Regularizer`, with the same meaning.

    Raises:
        ForceError: a value is out of range, or values contradict each other.
    """

    readers: ClassVar = {
        "force": forces.from_json, "schedule": schedules.from_json, "budget": Budget.from_json,
    }  # fmt: skip

    force: Force = _EXPONENTIAL
    beta: Beta = 1e-4
    order: Order = "index"
    refresh_every: int = 0
    mode: Mode = "prox"
    kappa: Kappa = "sqrt"
    every: int = 1
    seed: int = 0
    schedule: Schedule | None = None
    steps: int | None = None
    budget: Budget | None = None
    acts_on: Part = "units"
    chosen_by: ChosenBy = "need"

    @property
    def steered(self) -> bool:
        """Return True if β is computed from the budget."""
        return self.beta == "auto"

    def __post_init__(self) -> None:
        require(
            isinstance(self.force, Force),
            f"force={self.force!r}; pass one such as forces.exponential() (with parentheses).",
        )
        require(
            self.steered or (is_number(self.beta) and 0 <= float(self.beta) < math.inf),
            f"beta={self.beta!r}; the strength must be a finite number of at least 0, or 'auto'.",
        )
        _choice("order", self.order, get_args(Order))
        _choice("mode", self.mode, get_args(Mode))
        _choice("kappa", self.kappa, get_args(Kappa))
        _choice("acts_on", self.acts_on, get_args(Part))
        _choice("chosen_by", self.chosen_by, get_args(ChosenBy))
        _count("refresh_every", self.refresh_every, 0)
        _count("every", self.every, 1)
        require(isinstance(self.seed, int), f"seed={self.seed!r}; it must be an integer.")
        self._check_relations()
        self._check_steered()

    def _check_relations(self) -> None:
        require(
            self.refresh_every == 0 or self.order == "importance",
            f"refresh_every={self.refresh_every} with order={self.order!r}: only the order 'importance' ever changes.",
        )
        require(
            self.every == 1 or self.mode != "loss",
            f"every={self.every} with mode='loss': the loss is the user's; add penalty() as often as it should act.",
        )
        require(
            self.mode != "prox" or not self.force.elementwise,
            f"force={self.force.name!r} acts on single numbers, which no shrinking of units does: use mode='gradient' "
            "or 'loss'.",
        )
        require(
            self.schedule is None or isinstance(self.schedule, Schedule),
            f"schedule={self.schedule!r}; pass one such as schedules.cubic() (with parentheses).",
        )
        if self.steps is not None:
            _count("steps", self.steps, 1)
        require(
            self.schedule is None or self.steps is not None,
            "a schedule goes by step / steps: pass steps, the number of optimizer steps of the phase.",
        )

    def _check_steered(self) -> None:
        if not self.steered:
            require(self.budget is None, "budget= is what beta='auto' steers to; a fixed strength has no use for it.")
            require(
                self.acts_on == "units",
                f"acts_on={self.acts_on!r} with a fixed strength: only with beta='auto' are losers known.",
            )
            require(
                self.chosen_by == "need",
                f"chosen_by={self.chosen_by!r} with a fixed strength: only with beta='auto' are losers chosen.",
            )
            return
        require(
            isinstance(self.budget, Budget) and self.steps is not None,
            "beta='auto' steers to a budget by the end of a phase: pass budget=etp.Budget(...) and steps, the number "
            "of optimizer steps of the phase.",
        )
        assert self.budget is not None
        require(
            self.budget.quantity != "latency",
            f"beta='auto' with {self.budget.as_given}: no time can be measured in every step. Give the regularizer a "
            "budget in MACs or parameters.",
        )
        require(
            self.mode == "prox" and self.every == 1 and self.refresh_every == 0,
            f"beta='auto' with mode={self.mode!r}, every={self.every}, refresh_every={self.refresh_every}: it takes "
            "units to zero, which only mode='prox' can, in every step, and it ranks anew by itself.",
        )
        require(
            not self.force.squared and not self.force.adaptive,
            f"beta='auto' with force={self.force.name!r}: a force on squared norms never ends at zero, and one that "
            "changes with the weights has no strength of its own. Use exponential, linear, heaviside or uniform.",
        )

    def require_equal(self, other: Mapping[str, Any]) -> None:
        """Raise :class:`ForceError` if ``other`` (from ``to_dict``) differs; the message names every such field."""
        mine = self.to_dict()
        differ = [f"{k}: {other.get(k)!r}, here {v!r}" for k, v in mine.items() if other.get(k) != v]
        if differ:
            raise ForceError(f"the state was saved with other settings ({'; '.join(differ)}): use the same ones.")


def read_state(state: Mapping[str, Any], plan: Plan, settings: RegularizerSettings) -> tuple[int, Tensor, Tensor]:
    """Return the number of steps, the distances and the pending force, both [n_units], of a regularizer's state.

    Raises:
        PlanError: the state belongs to another plan.
        ForceError: this is not a state, or it has another format, is damaged, or was saved with other settings.
    """
    missing = {"format", "plan", "settings", "steps_done", "distance", "pending"} - set(state)
    if missing or state["format"] != FORMAT:
        raise ForceError(f"this is not a regularizer's state of format {FORMAT}; missing: {sorted(missing)}.")
    if state["plan"] != plan.fingerprint:
        raise PlanError("this state was saved with another plan; make the regularizer with that plan.")
    settings.require_equal(state["settings"])
    distance, pending, steps = (
        torch.as_tensor(state["distance"], device="cpu"),
        torch.as_tensor(state["pending"], device="cpu"),
        state["steps_done"],
    )
    sound = all(tuple(v.shape) == (plan.n_units,) and bool(v.isfinite().all()) for v in (distance, pending))
    if not sound or not isinstance(steps, int) or steps < 0:
        raise ForceError(
            f"this state is damaged: expected finite vectors of shape [{plan.n_units}] and a count of steps."
        )
    return steps, distance, pending


def checked_vector(value: object, name: str, like: Tensor) -> Tensor:
    """Return a copy of a vector of a state, on the device of ``like``.

    Raises:
        ForceError: this is not a finite vector with the shape and dtype of ``like``.
    """
    sound = isinstance(value, Tensor) and value.shape == like.shape and value.dtype == like.dtype
    if not sound or not bool(torch.as_tensor(value).isfinite().all()):
        raise ForceError(f"this state is damaged: {name} has to be a finite vector, {like.dtype} {list(like.shape)}.")
    return torch.as_tensor(value).to(like.device, copy=True)
