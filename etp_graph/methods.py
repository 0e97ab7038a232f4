"""Named pruning methods: which force acts while training, and which score decides what goes. Presets are data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, get_args

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import criteria, forces, schedules
from .budget import Budget, Rank, Scope
from .configured import Composed, number, require
from .criteria import Forced, Normalize
from .errors import ScoreError
from .forces import Force
from .plan import Plan
from .regularizer import Regularizer
from .schedules import Schedule
from .settings import Kappa, Mode, Order, RegularizerSettings

Part = Literal["units", "scales"]
_CUBIC = schedules.Cubic()


@dataclass(frozen=True, slots=True, kw_only=True)
class Method(Composed):
    """A pruning method: sparse training with a force, then the criterion, then the way to the budget.

    ``dataclasses.replace(methods.get("etp"), beta=1e-3)`` is a variant of a preset.

    Attributes:
        name: of the method, for reports.
        source: where it is described.
        force: F of the sparse phase, see :mod:`etp_graph.forces`; ``None``: there is no sparse phase.
        beta, order, refresh_every, mode, kappa, every, seed: of the :class:`etp_graph.Regularizer`. The seed is also
            that of the criterion ``random``.
        strength: s(t), how β rises during the sparse phase; it needs ``phase.attach(optimizer, steps=...)``.
        acts_on: ``"units"``: the force acts on every slice of a unit. ``"scales"``: only on its batch norm scales.
        criterion: a name of :data:`etp_graph.criteria.CRITERIA`. ``etp`` is the torque of this method's own force.
        p: order of the norm; of the criterion ``magnitude``.
        normalize: within a group; of the criterion ``magnitude``.
        scope, rank: how units of different groups are compared, see :class:`etp_graph.Budget`.
        rounds: how often sparse training, surgery and fine-tuning are repeated.
        schedule: share of the way to the budget that is done after the share t of the rounds; it ends at 1.

    Raises:
        ForceError: a value is out of its range.
        ScoreError: the criterion is unknown, or cannot be used without gradients.
        BudgetError: scope or rank is unknown.
    """

    readers: ClassVar = {"force": forces.from_json, "strength": schedules.from_json, "schedule": schedules.from_json}

    name: str
    source: str = ""
    force: Force | None = None
    beta: float = 1e-4
    order: Order = "index"
    refresh_every: int = 0
    mode: Mode = "prox"
    kappa: Kappa = "sqrt"
    every: int = 1
    seed: int = 0
    strength: Schedule | None = None
    acts_on: Part = "units"
    criterion: str = "magnitude"
    p: float = 2
    normalize: Normalize = "mean"
    scope: Scope = "global"
    rank: Rank = "score"
    rounds: int = 1
    schedule: Schedule = _CUBIC

    def __post_init__(self) -> None:
        require(isinstance(self.name, str) and bool(self.name), f"name={self.name!r}; a method has a name.")
        self.settings(steps=1)  # checks every field of the regularizer
        require(
            self.acts_on in get_args(Part),
            f"acts_on={self.acts_on!r}; choose one of {', '.join(map(repr, get_args(Part)))}.",
        )
        self._check_criterion()
        Budget(params=0, scope=self.scope, rank=self.rank)
        check_rounds(self.rounds, self.schedule)

    def _check_criterion(self) -> None:
        usable = [name for name in criteria.CRITERIA if name != "taylor"]
        if self.criterion == "taylor":
            raise ScoreError(
                f"method {self.name!r}: criterion 'taylor' needs gradients, which no phase leaves behind. Use "
                f"criteria.taylor, allocate and prune_ by hand, or one of {', '.join(usable)}."
            )
        if self.criterion not in usable:
            raise ScoreError(
                f"method {self.name!r}: there is no criterion {self.criterion!r}; known are {', '.join(usable)}."
            )
        if not number(self.p) or not 0 < self.p < math.inf:
            raise ScoreError(f"method {self.name!r}: p={self.p!r}; the order of a norm is positive and finite.")
        if self.normalize not in get_args(Normalize):
            allowed = ", ".join(map(repr, get_args(Normalize)))
            raise ScoreError(f"method {self.name!r}: normalize={self.normalize!r}; choose one of {allowed}.")

    def settings(self, *, steps: int | None = None) -> RegularizerSettings:
        """The settings of the regularizer for a sparse phase of so many optimizer steps."""
        return RegularizerSettings(
            force=self.force if self.force is not None else forces.Uniform(), beta=self.beta, order=self.order,
            refresh_every=self.refresh_every, mode=self.mode, kappa=self.kappa, every=self.every, seed=self.seed,
            schedule=self.strength, steps=steps if self.strength is not None else None,
        )  # fmt: skip

    def regularizer(self, model: nn.Module, plan: Plan, *, steps: int | None = None) -> Regularizer | None:
        """The regularizer of the sparse phase; ``None`` if the method has no force.

        Raises:
            ForceError: the method's strength follows a schedule and ``steps`` is missing.
            PlanError: the plan is not of this model, or nothing of it may be pruned.
        """
        if self.force is None:
            return None
        require(
            self.strength is None or steps is not None,
            f"method {self.name!r} raises its strength by a schedule: call phase.attach(optimizer, steps=n), n being "
            "the number of optimizer steps of the phase.",
        )
        found = self.settings(steps=steps)
        values = {field.name: getattr(found, field.name) for field in fields(found)}
        return Regularizer(model, scales_only(model, plan) if self.acts_on == "scales" else plan, **values)

    def scores(self, model: nn.Module, plan: Plan, *, regularizer: Forced | None = None) -> Tensor:
        """The scores of the method's criterion, float [plan.n_units]; the lowest go first.

        Without ``regularizer`` the torque takes the distances that a new one would begin with.

        Raises:
            PlanError: the plan is not of this model.
            ScoreError: the criterion cannot be computed.
        """
        if self.criterion == "etp":
            return criteria.etp(model, plan, regularizer=regularizer or self.regularizer(model, plan, steps=1))
        if self.criterion == "magnitude":
            return criteria.magnitude(model, plan, p=self.p, normalize=self.normalize)
        if self.criterion == "random":
            return criteria.random(model, plan, seed=self.seed)
        return criteria.CRITERIA[self.criterion](model, plan)


def check_rounds(rounds: int, schedule: Schedule) -> None:
    """Raise :class:`ForceError` unless the schedule climbs to the whole budget in so many rounds."""
    require(
        isinstance(rounds, int) and not isinstance(rounds, bool) and rounds >= 1,
        f"rounds={rounds!r}; it must be an integer of at least 1.",
    )
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
    """The plan in which a force finds only the scales of batch norms; all other slices are passive."""

    def is_scale(tensor: str) -> bool:
        module, _, leaf = tensor.rpartition(".")
        return leaf == "weight" and isinstance(model.get_submodule(module), _BatchNorm)

    return replace(plan, groups=tuple(
        replace(g, slices=tuple(replace(s, passive=s.passive or not is_scale(s.tensor)) for s in g.slices))
        for g in plan.groups
    ))  # fmt: skip


_PRESETS = (
    Method(
        name="etp", source="ETP: Modi et al. 2025; the force by rank of importance, applied as a proximal step",
        force=forces.Exponential(), beta=3e-4, order="importance", mode="prox", criterion="etp",
    ),
    Method(
        name="etp-paper", source="ETP: Modi et al. 2025, eq. 8-10, with lambda = exp(5/N): index order, pivot 0",
        force=forces.Exponential(), beta=1e-3, order="index", mode="gradient", kappa="one", criterion="etp",
    ),
    Method(
        name="torque", source="Torque: Gupta et al. 2024, eq. 9-13",
        force=forces.Linear(), beta=1e-3, order="index", mode="gradient", kappa="one", criterion="etp",
    ),
    Method(
        name="depgraph", source="DepGraph: Fang et al. 2023, eq. 5, in this library's own implementation",
        force=forces.Growing(), beta=5e-4, mode="gradient", kappa="one", criterion="magnitude", normalize="max",
    ),
    Method(
        name="group-lasso", source="Yuan & Lin 2006: the same force on every unit",
        force=forces.Uniform(), beta=3e-4, mode="prox", criterion="magnitude",
    ),
    Method(
        name="network-slimming", source="Network Slimming: Liu et al. 2017: L1 on the scales of batch norms",
        force=forces.Uniform(), beta=1e-4, mode="gradient", kappa="one", acts_on="scales", criterion="bn_scale",
    ),
    Method(name="l1", source="Li et al. 2017, over all slices of a unit", criterion="magnitude", p=1),
    Method(name="random", source="random units: the control that every method has to beat", criterion="random"),
)  # fmt: skip

METHODS: Mapping[str, Method] = {method.name: method for method in _PRESETS}
"""Every preset of the library, by name."""


def get(name: str | Method) -> Method:
    """The preset of this name; a :class:`Method` is returned as it is.

    Raises:
        ForceError: there is no such method; the message lists all of them.
    """
    if isinstance(name, Method):
        return name
    require(
        isinstance(name, str) and name in METHODS,
        f"there is no method {name!r}; known are {', '.join(METHODS)}. Pass one of these names, or a methods.Method.",
    )
    return METHODS[name]
