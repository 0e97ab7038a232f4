"""Pruning method: the force that acts during training, and the criterion that chooses the units to remove."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from etp_graph import criteria, forces, schedules
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
from etp_graph._json import shorten
from etp_graph.budget import Budget, Rank, Scope
from etp_graph.collect import Observations, Observed, filters_only
from etp_graph.criteria import Criterion, Forced, Normalize, Score
from etp_graph.errors import BudgetError, ScoreError
from etp_graph.forces import Force
from etp_graph.plan import KINDS, Plan
from etp_graph.regularizer import ForceSettings, Regularizer, RegularizerSettings
from etp_graph.schedules import Schedule

Part = Literal["units", "scales", "filters", "losers"]

_CUBIC = schedules.Cubic()


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Method(ForceSettings):
    """A pruning method: the force of sparse training, the criterion, and the rules for reaching the budget.

    It has the settings of :class:`etp_graph.regularizer.ForceSettings` (``beta``, ``order``, ``refresh_every``,
    ``mode``, ``kappa``, ``every``, ``seed``, ``chosen_by``, ``need_force``), and these. With ``beta="auto"`` the
    strength follows from the budget of the run; this needs ``phase.attach(optimizer, steps=...)``. ``seed`` is also the
    seed of the criterion ``random``.

    To vary a preset, call for example ``dataclasses.replace(methods.get("etp"), beta=1e-3)``.

    Attributes:
        name: name of the method, for reports.
        source: publication that describes the method.
        force: F of the sparse phase, see :mod:`etp_graph.forces`; ``None``: no force acts.
        strength: s(t), the factor of β at the share t of the sparse phase. With ``beta="auto"``: the fraction of the
            cost reduction reached at t. A schedule needs ``phase.attach(optimizer, steps=...)``.
        acts_on: slices that the force acts on. ``"units"``: every slice of a unit. ``"scales"``: only its batch norm
            scales. ``"filters"``: only the weights of the layers that produce it. ``"losers"``: every slice, but only
            of the losers, the units to be removed for the budget. With ``beta="auto"`` the regularizer chooses the
            losers; with a fixed strength :func:`etp_graph.compress` chooses them by the criterion.
        select_at: share of the sparse phase after which the losers are chosen; until then the force acts on all units.
        soft_every: set the filters of the losers to zero every ``soft_every`` steps; 0: never. Needs no force.
        criterion: a name of :data:`etp_graph.criteria.CRITERIA`, or a function of (model, plan) that returns scores
            [n_units]. A function goes to JSON if :func:`etp_graph.criteria.register` knows it. ``etp`` is the torque of
            this method's own force. Criteria that need data record it in the phase ``calibrate``.
        p: order of the norm of the criterion ``magnitude``.
        normalize: normalization of scores within a group, for criteria that have this argument.
        scope, rank: how units of different groups are compared, see :class:`etp_graph.Budget`.
        min_units: every group keeps at least this many units, in addition to the rules of the budget.
        max_ratio: at most this share of the units of a group is removed, in addition to the rules of the budget.
        rounds: number of rounds of sparse training, surgery and fine-tuning.
        schedule: maps the share t of finished rounds to the fraction of the cost reduction reached then; ends at 1.

    Raises:
        ForceError: a value is out of its range.
        ScoreError: the criterion is unknown, or ``p`` or ``normalize`` is out of range.
        BudgetError: scope or rank is unknown.
    """

    readers: ClassVar = {
        "force": forces.from_json, "need_force": forces.from_json, "strength": schedules.from_json,
        "schedule": schedules.from_json,
    }  # fmt: skip

    name: str = field(metadata=before("beta"))
    source: str = field(default="", metadata=before("beta"))
    force: Force | None = field(default=None, metadata=before("beta"))
    strength: Schedule | None = field(default=None, metadata=before("chosen_by"))
    acts_on: Part = field(default="units", metadata=before("chosen_by"))
    select_at: float = 0.0
    soft_every: int = 0
    criterion: str | Score = "magnitude"
    p: float = 2
    normalize: Normalize = "mean"
    scope: Scope = "global"
    rank: Rank = "score"
    min_units: int | None = field(default=None, metadata=LATER)
    max_ratio: float | None = field(default=None, metadata=LATER)
    rounds: int = 1
    schedule: Schedule = _CUBIC

    def __post_init__(self) -> None:
        require(isinstance(self.name, str) and bool(self.name), f"name={self.name!r}; a method has a name.")
        ForceSettings.__post_init__(self)  # super() fails in a dataclass with slots
        self.settings(steps=1, budget=Budget(params=0))  # checks what a regularizer checks
        require_choice("acts_on", self.acts_on, get_args(Part))
        self._check_criterion()
        self._check_losers()
        require_choice("scope", self.scope, get_args(Scope), BudgetError)
        require_choice("rank", self.rank, get_args(Rank), BudgetError)
        self.with_rules(Budget(params=0))  # checks min_units and max_ratio
        check_rounds(self.rounds, self.schedule)

    def _check_criterion(self) -> None:
        # A function with a name of its own, and its name, make equal methods; so do a function and its import path.
        object.__setattr__(self, "criterion", self._criterion.reference)
        require_number(f"method {self.name!r}: p", self.p, 0, math.inf, ScoreError, excluded=(0,))
        require_choice(f"method {self.name!r}: normalize", self.normalize, get_args(Normalize), ScoreError)

    def _check_losers(self) -> None:
        require_count("soft_every", self.soft_every, 0)
        require_number("select_at", self.select_at, 0, 1, excluded=(1,), why="a share of the sparse phase")
        require(
            self.select_at == 0 or self.acts_on == "losers",
            f"select_at={self.select_at} with acts_on={self.acts_on!r}: only losers are ever chosen.",
        )
        observed_in_training = self.steered and self.chosen_by == "criterion" and self.observes == "gradients"
        require(
            not self.collected or observed_in_training or (self.acts_on != "losers" and not self.soft_every),
            f"method {self.name!r}: losers are chosen while training, and criterion {self.criterion_name!r} needs data "
            "that is only collected after it.",
        )
        require(
            self.acts_on != "losers" or self.steered or (self.order == "index" and self.force is not None),
            f"method {self.name!r}: acts_on='losers' with a fixed strength replaces the order: leave order='index' and "
            "give a force; or choose acts_on='units'.",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return every field as a value that JSON can store; a criterion is its name.

        Raises:
            ScoreError: the criterion is a function that is not registered.
            ForceError: the force or a schedule is of a class that is not registered.
        """
        return {**Composed.to_dict(self), "criterion": self._criterion.json_name()}

    @property
    def _criterion(self) -> Criterion:
        return criteria.find_criterion(self.criterion)

    @property
    def criterion_name(self) -> str:
        """Name of the criterion, also if it is a function."""
        return self._criterion.name

    @property
    def observes(self) -> Observed | None:
        """Data that the criterion needs, a statistic of activations or ``"gradients"``; ``None`` if it needs none."""
        return self._criterion.observes

    @property
    def sparse(self) -> bool:
        """True if the method has a sparse phase."""
        return self.force is not None or self.soft_every > 0

    @property
    def steered(self) -> bool:
        """True if the strength of the force follows from the budget."""
        return self.force is not None and self.beta == "auto"

    @property
    def collected(self) -> bool:
        """True if the criterion needs batches of data, so that the method has a phase to collect them."""
        return self.observes is not None

    def with_rules(self, budget: Budget) -> Budget:
        """Return the budget with this method's ``scope`` and ``rank`` in place of ``None``, and the stricter floors.

        The floors are ``min_units`` and ``max_ratio``. The stricter of the method's and the budget's holds.
        """
        least = 1 if self.min_units is None else self.min_units
        most = 1.0 if self.max_ratio is None else self.max_ratio
        require_count("min_units", least, 1, BudgetError)
        require_number("max_ratio", most, 0, 1, BudgetError)
        return replace(
            budget, scope=budget.scope or self.scope, rank=budget.rank or self.rank,
            min_units=_stricter_floor(budget.min_units, least), max_ratio=min(most, budget.max_ratio),
        )  # fmt: skip

    def settings(self, *, steps: int | None = None, budget: Budget | None = None) -> RegularizerSettings:
        """Return the settings of the regularizer for a sparse phase of ``steps`` optimizer steps and this budget."""
        timed = self.strength is not None or self.steered
        values = self.shared() if self.steered else {**self.shared(), "chosen_by": "need", "need_force": None}
        return RegularizerSettings(
            **values,
            force=self.force if self.force is not None else forces.Uniform(),
            schedule=self.strength,
            steps=steps if timed else None,
            budget=self.with_rules(budget) if self.steered and budget is not None else None,
            acts_on="losers" if self.steered and self.acts_on == "losers" else "units",
        )

    def regularizer(
        self, model: nn.Module, plan: Plan, *, steps: int | None = None, budget: Budget | None = None
    ) -> Regularizer | None:
        """Return a regularizer for the sparse phase; ``None`` if the method has no force.

        Raises:
            ForceError: the method's strength follows a schedule or a budget and ``steps`` or ``budget`` is missing.
            PlanError: the plan is not of this model, or all its groups are locked.
        """
        if self.force is None:
            return None
        require(
            (self.strength is None and not self.steered) or steps is not None,
            f"method {self.name!r} sets its strength by the share of the phase that is done: call "
            "phase.attach(optimizer, steps=n), n being the number of optimizer steps of the phase.",
        )
        found = Regularizer(model, self.acted_on(model, plan), self.settings(steps=steps, budget=budget))
        if self.steered and self.chosen_by == "criterion":
            found.choose_losers_by(self._loser_score(model, plan, found), effects=self.collected)
        return found

    def acted_on(self, model: nn.Module, plan: Plan) -> Plan:
        """Return the plan in which only the slices that the force acts on are not passive."""
        only = {"scales": scales_only, "filters": filters_only}.get(self.acts_on)
        return plan if only is None else only(model, plan)

    def _loser_score(self, model: nn.Module, plan: Plan, regularizer: Regularizer) -> Callable[[Tensor], Tensor]:
        """Return the function of the effects on the loss that scores units by the criterion while training."""

        def score(effects: Tensor) -> Tensor:
            record = Observations({self.criterion_name: effects}) if self.collected else None
            return self.scores(model, plan, regularizer=regularizer, record=record)

        return score

    def scores(
        self, model: nn.Module, plan: Plan, *, regularizer: Forced | None = None, record: Observations | None = None
    ) -> Tensor:
        """Return the scores of the method's criterion, float [plan.n_units]. Units of low score are removed first.

        Args:
            model: the model that the plan was traced from.
            plan: the plan.
            regularizer: the regularizer of the sparse phase, for the torque. Without it, the torque uses the initial
                distances of a new regularizer.
            record: data recorded by :func:`etp_graph.collect.watch`, for criteria that need it.

        Raises:
            PlanError: the plan is not of this model.
            ScoreError: the criterion cannot be computed.
        """
        found = self._criterion
        given: dict[str, Any] = {"p": self.p, "normalize": self.normalize, "seed": self.seed}
        given |= {"record": record, "observations": record}
        if "regularizer" in found.options:
            given["regularizer"] = regularizer or self._without_strength().regularizer(model, plan, steps=1)
        return found.score(model, plan, **{name: given[name] for name in found.options})

    def _without_strength(self) -> Method:
        """Return the method with strength 0 if its strength follows from a budget, so that no budget is needed."""
        return replace(self, beta=0.0, acts_on="units", mode="prox") if self.steered else self


def _stricter_floor(given: int | Mapping[str, int], least: int) -> int | Mapping[str, int]:
    """Return the larger of a budget's ``min_units``, which may be a number for each kind of unit, and ``least``."""
    if isinstance(given, int):
        return max(given, least)
    return given if least <= 1 else {kind: max(given.get(kind, 1), least) for kind in KINDS}


show_fields(Method)(Method.__init__)


MAX_ROUNDS = 10_000
"""Most rounds of a run. Damage could otherwise ask for so many that a check of them does not end."""


def check_rounds(rounds: int, schedule: Schedule) -> None:
    """Raise :class:`ForceError` unless the schedule never decreases over the rounds and ends at 1."""
    require_count("rounds", rounds, 1)
    require(rounds <= MAX_ROUNDS, f"rounds={shorten(rounds)}; at most {MAX_ROUNDS} are possible.")
    require(
        isinstance(schedule, Schedule),
        f"schedule={schedule!r}; pass one such as schedules.cubic() (with parentheses).",
    )
    way = [schedule((done + 1) / rounds) for done in range(rounds)]
    require(
        way == sorted(way) and way[-1] == 1,
        f"schedule={schedule!r} ends at {way[-1]:g} after {rounds} rounds: it must climb to 1, the whole budget.",
    )


def scales_only(model: nn.Module, plan: Plan) -> Plan:
    """Return the plan with every slice passive except batch norm scales, so that a force acts on these scales only."""

    def is_scale(tensor: str) -> bool:
        module, _, leaf = tensor.rpartition(".")
        return leaf == "weight" and isinstance(model.get_submodule(module), _BatchNorm)

    return replace(plan, groups=tuple(
        replace(g, slices=tuple(replace(s, passive=s.passive or not is_scale(s.tensor)) for s in g.slices))
        for g in plan.groups
    ))  # fmt: skip
