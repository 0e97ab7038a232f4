"""What is compared: criteria, how their units compare across groups, and what is made good."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

import etp_graph as etp
from benchmarks.common.scores import given, observed_scores
from benchmarks.oneshot.search import searched_scores
from benchmarks.tasks.base import Task
from etp_graph.recovery import InputMoments, input_moments

MadeGood = Literal["nothing", "norms", "weights", "blend"]

MADE_GOOD: tuple[MadeGood, ...] = ("nothing", "norms", "weights", "blend")
"""Nothing; batch norms are measured anew; the layers that read removed units get new weights, by the default ridge; or
the best blend of old and new weights, which is the default of ``oneshot_``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A criterion and how its scores compare across groups.

    Attributes:
        criterion: its name.
        scope, rank: as of :class:`etp_graph.Budget`.
        allocation: ``scores``; ``sensitivity``: measured by :func:`etp_graph.criteria.sensitivity`; ``search``: found
            by optuna.
        source: where it comes from.
    """

    criterion: str
    scope: Literal["global", "local"] = "local"
    rank: Literal["score", "score_per_mac"] = "score"
    allocation: Literal["scores", "sensitivity", "search"] = "scores"
    source: str = ""


METHODS: Mapping[str, Method] = {
    "random": Method(criterion="random", source="control; the same share of every group"),
    "magnitude": Method(criterion="magnitude", source="group norm; the same share of every group"),
    "fpgm": Method(criterion="fpgm", source="He et al. 2019; the same share of every group"),
    "wanda": Method(criterion="wanda", source="An et al. 2024, section 5; the same share of every group"),
    "flap": Method(criterion="flap", scope="global", source="An et al. 2024"),
    "obs": Method(
        criterion="obs", source="least error of the next layer after reconstruction, the aim of ThiNet (Luo et al. "
        "2017); the same share of every group",
    ),
    "taylor": Method(criterion="taylor", scope="global", source="Molchanov et al. 2019"),
    "fisher": Method(criterion="fisher", scope="global", rank="score_per_mac", source="this library's default"),
    "kron-obs": Method(criterion="kron_obs", scope="global", rank="score_per_mac", source="Wang et al. 2019"),
    "fisher, sensitivity": Method(
        criterion="fisher", scope="global", rank="score_per_mac", allocation="sensitivity",
        source="this library: `oneshot_(allocation=\"sensitivity\")`",
    ),
    "fisher, search": Method(
        criterion="fisher", scope="global", allocation="search",
        source="widths by search, as AMC (He et al. 2018) and ABCPruner (Lin et al. 2020); here by optuna",
    ),
}  # fmt: skip


@dataclass(slots=True)
class Experiment:
    """A dense network of a task with its plan and calibration batches; scores and moments are computed once.

    Attributes:
        task: the task.
        model: its dense network.
        plan: its plan.
        batches: calibration batches.
        seed: of the calibration examples, and of random numbers.
    """

    task: Task
    model: nn.Module
    plan: etp.Plan
    batches: list[Any]
    seed: int
    _scores: dict[str, Tensor] = field(default_factory=dict)
    _moments: InputMoments | None = None

    @classmethod
    def of(cls, task: Task, model: nn.Module, seed: int) -> Experiment:
        """The experiment of a seed."""
        batches = [task.inputs(some) for some in task.calibration(torch.Generator().manual_seed(seed))]
        plan = etp.trace(model, task.example(), prune=task.prune, ignore=task.ignore, check=False)
        return cls(task=task, model=model, plan=plan, batches=batches, seed=seed)

    def prune(self, method: Method, speed_up: float, made_good: MadeGood) -> nn.Module:
        """A pruned copy."""
        scores = self._scores_of(method, speed_up)
        model = copy.deepcopy(self.model)
        etp.oneshot_(
            model, self.batches, criterion=given(scores), plan=self.plan, progress=False,
            budget=etp.Budget(speed_up=speed_up, scope=method.scope, rank=method.rank),
            compensate=self._recorded() if made_good in ("weights", "blend") else False,
            batch_norms=made_good == "norms", **({"blend": 1} if made_good == "weights" else {}),
        )  # fmt: skip
        return model

    def has_norms(self) -> bool:
        """Whether there are statistics of batch norms."""
        return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules())

    def _recorded(self) -> InputMoments:
        if self._moments is None:
            self._moments = input_moments(self.model, self.plan, self.batches)
        return self._moments

    def _scores_of(self, method: Method, speed_up: float) -> Tensor:
        plain = self._kept(method.criterion, lambda: self._observe(method.criterion))
        if method.allocation == "sensitivity":
            return self._kept(
                f"{method.criterion}, sensitivity",
                lambda: etp.criteria.sensitivity(self.model, self.plan, plain, self.batches, progress=False),
            )
        if method.allocation == "search":
            return self._kept(
                f"{method.criterion}, search at {speed_up}",
                lambda: searched_scores(self.model, self.plan, plain, self.batches, speed_up, self.seed),
            )
        return plain

    def _kept(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        if name not in self._scores:
            self._scores[name] = compute()
        return self._scores[name]

    def _observe(self, criterion: str) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        labelled = self.task.calibration(generator)
        losses = [lambda some=some: self.task.loss(self.model, some, generator) for some in labelled]
        return observed_scores(self.model, self.plan, criterion, self.batches, data_losses=losses, seed=self.seed)
