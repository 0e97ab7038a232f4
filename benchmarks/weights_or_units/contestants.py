"""The contestants of :mod:`benchmarks.weights_or_units.run`, from fresh weights or from one checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import etp_graph as etp
from benchmarks.common.contestant_names import SMALL, UNPRUNED
from benchmarks.common.machine import commit, machine_conditions, median_seconds, nonzero, parameters
from benchmarks.common.records import Record
from benchmarks.contest.protocol import TUNING_SEED
from benchmarks.contest.training import checkpoint, train
from benchmarks.tasks.base import Metric, Part
from benchmarks.tasks.ptb import Ptb
from benchmarks.weights_or_units.masks import Masks, target
from etp_graph.errors import BudgetError, EtpError
from etp_graph.schedules import Cubic

TASK = "ptb"
METHODS = (UNPRUNED, "large-sparse", "large-pruned-by-units", SMALL)
EVERY = 10
"""Steps between two updates of the masks, or two removals of units."""
SCHEDULE = Cubic()
FORMAT = 1
Trial = dict[str, Any]
"""A learning rate that was tried, and the metric on the validation part (``None``: training failed)."""
RATES = (0.25, 1.0, 2.0)
"""What the learning rates of the recipe are multiplied with, in trials: one rate does not suit every width."""
TRIAL = 0.5
"""Share of the steps that a trial of small-dense takes; the checkpoint is tried in full."""
_ROUNDS = {"smoke": 2, "cpu": 60, "full": 60, "paper": 100}
Raise = Callable[[float], object]
"""Is told which share of the way from the dense network to the target has to be done now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One run. ``sparsity``: share of the weights without which the network has to do; the unpruned control has 0."""

    task: str
    scale: str
    method: str
    sparsity: float
    seed: int


def with_width(task: Ptb, width: int) -> nn.Module:
    """The task's model with another width of embedding and layers, and fresh weights as suit that width."""
    small = copy.copy(task)
    small.width = width
    return small.build()


def widest(task: Ptb, params: int) -> int:
    """The largest width with at most so many parameters. Raises :class:`BudgetError` if there is none."""
    for width in range(task.width, 0, -1):
        with torch.device("meta"):
            if parameters(with_width(task, width)) <= params:
                return width
    raise BudgetError(f"params={params}: the model has more at any width.")


def with_rate(task: Ptb, rate: float) -> Ptb:
    """The task with another learning rate from fresh weights, and the other two in proportion."""
    chosen, old = copy.copy(task), task.recipe
    by = rate / old.dense_rate
    chosen.recipe = replace(
        old, dense_rate=rate, sparse_rate=by * old.sparse_rate, finetune_rate=by * old.finetune_rate
    )
    return chosen


def best(trials: Sequence[Trial], metric: Metric) -> float:
    """The learning rate whose trial is best on the validation part; of equal ones the first."""
    done = [trial for trial in trials if trial["val"] is not None]
    if not done:
        raise FloatingPointError("training diverged in every trial")
    chosen = max if metric.higher else min
    return float(chosen(done, key=lambda trial: trial["val"])["rate"])


class Experiment:
    """All runs on one task, from one checkpoint: the best on the validation part under several learning rates.

    Attributes:
        task: with the learning rates of that checkpoint.
        dense: the checkpoint.
        tried: the learning rates of the checkpoint.
        trials: those of small-dense, by sparsity.
    """

    def __init__(self, task: Ptb) -> None:
        self.given = task
        self.tried = [self._trial(by, checkpoint) for by in RATES]
        self.task = with_rate(task, best(self.tried, task.metric))
        self.dense = checkpoint(self.task)
        self.trials: dict[float, list[Trial]] = {}
        self._read: dict[Part, float] = {}

    def run(self, config: Config) -> Record:
        """One run as a record, ready for JSON."""
        begin = perf_counter()
        record: Record = {
            "format": FORMAT, "config": asdict(config), "title": self.task.title, "metric": asdict(self.task.metric),
            "recipe": asdict(self.given.recipe), "schedule": SCHEDULE.to_dict(), "every": EVERY,
            "checkpoint": self.task.checkpoint_note, "conditions": machine_conditions(), "commit": commit(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        try:
            model = self.network(config)
            record |= {"status": "ok", **self._measured(model, config)}
        except FloatingPointError as error:
            record |= {"status": "failed", "reason": str(error)}
        except EtpError as error:  # out of reach: a property of the network and the sparsity
            record |= {"status": "not possible", "reason": f"{type(error).__name__}: {error}"}
        return {**record, "seconds": round(perf_counter() - begin, 1)}

    def network(self, config: Config) -> nn.Module:
        """What the contestant makes of the checkpoint, or of fresh weights."""
        if config.method == SMALL:
            task = with_rate(self.given, best(self._small_trials(config.sparsity), self.given.metric))
            return self._small(task, config.sparsity, config.seed)
        model = copy.deepcopy(self.dense)
        if config.method == UNPRUNED:
            self._train(model, config.seed)
        elif config.method == "large-sparse":
            masks = Masks(model)
            self._train(model, config.seed, lambda share: masks.raise_to(config.sparsity * share))
            masks.remove()
        else:
            self._units(model, config)
        return model

    def _train(
        self, model: nn.Module, seed: int, raise_to: Raise = lambda share: None,
        attach: Callable[[Optimizer], object] = lambda optimizer: None,
    ) -> None:  # fmt: skip
        """The phase in which the schedule rises, and the one after it."""
        recipe = self.task.recipe
        rising = recipe.sparse_steps

        def after_step(step: int) -> None:
            if step % EVERY == 0 or step == rising:
                raise_to(SCHEDULE(step / rising))

        train(
            self.task, model, steps=rising, peak=recipe.sparse_rate, seed=seed, start=0, attach=attach,
            after_step=after_step,
        )  # fmt: skip
        train(self.task, model, steps=recipe.finetune_steps, peak=recipe.finetune_rate, seed=seed, start=rising)

    def _units(self, model: nn.Module, config: Config) -> None:
        """Every group loses the same share of its units, those with the smallest weights, as the matrices do."""
        dense, goal = parameters(model), target(model, config.sparsity)
        optimizers: list[Optimizer] = []

        def cut(share: float) -> None:
            plan = etp.trace(model, self.task.example(), prune=self.task.prune, ignore=self.task.ignore, check=False)
            scores = etp.criteria.magnitude(model, plan, p=1)
            budget = etp.Budget(params=dense - int(share * (dense - goal)), scope="local")
            selection = etp.allocate(model, plan, scores, budget=budget)
            etp.prune_(model, plan, selection, optimizer=optimizers[-1])

        self._train(model, config.seed, cut, optimizers.append)

    def _small(self, task: Ptb, sparsity: float, seed: int, share: float = 1.0) -> nn.Module:
        """Fresh weights; as many steps as the checkpoint and the two phases took together, in one phase."""
        recipe = task.recipe
        width = widest(task, target(self.dense, sparsity))
        torch.manual_seed(seed)
        model = with_width(task, width).to(task.device)
        steps = round(share * (recipe.dense_steps + recipe.sparse_steps + recipe.finetune_steps))
        train(task, model, steps=steps, peak=recipe.dense_rate, seed=seed, start=0)
        return model

    def _small_trials(self, sparsity: float) -> list[Trial]:
        """The trials of small-dense at a sparsity, run once."""
        if sparsity not in self.trials:
            self.trials[sparsity] = [
                self._trial(by, lambda task: self._small(task, sparsity, TUNING_SEED, TRIAL)) for by in RATES
            ]
        return self.trials[sparsity]

    def _trial(self, by: float, trained: Callable[[Ptb], nn.Module]) -> Trial:
        """Never looks at the test part."""
        rate = by * self.given.recipe.dense_rate
        task = with_rate(self.given, rate)
        try:
            return {"rate": rate, "val": task.evaluate(trained(task), "val")}
        except FloatingPointError:
            return {"rate": rate, "val": None}

    def _measured(self, model: nn.Module, config: Config) -> Record:
        """Metrics, size and time of the finished network; nothing is chosen by them."""
        found: Record = {part: {"final": self.task.evaluate(model, part)} for part in ("val", "test")}
        if config.method != SMALL:
            if not self._read:
                self._read = {part: self.task.evaluate(self.dense, part) for part in ("val", "test")}
            for part, value in self._read.items():
                found[part]["checkpoint"] = value
            recipe = self.task.recipe
            found["rates"] = [recipe.dense_rate, recipe.sparse_rate, recipe.finetune_rate]
        inputs = self.task.latency_inputs()
        return {
            **found,
            "trials": self.trials[config.sparsity] if config.method == SMALL else self.tried,
            "target": target(self.dense, config.sparsity),
            "nonzero": [nonzero(self.dense), nonzero(model)], "params": [parameters(self.dense), parameters(model)],
            "latency": median_seconds([self.dense, model], inputs, repetitions=_ROUNDS[self.task.scale]),
        }  # fmt: skip
