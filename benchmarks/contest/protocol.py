"""What a comparison is; the one place that says so.

Every contestant begins with the same checkpoint, sees the same batches in the same order, takes the same number of
optimizer steps at the same learning rates, and is cut to the same MACs. A contestant with a strength has it chosen on
the validation part, by the same number of trials on the same schedule, with a seed that no run has
(:mod:`benchmarks.contest.tuning`). At the scales of whole data sets a trial is as long as a run, and a recipe whose
dense control loses too much is refused (:mod:`benchmarks.contest.gate`). The test part is read once for each finished
network, after everything else. Every run is one record. A run that was killed continues
(:mod:`benchmarks.contest.training_state`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

from torch import nn

from benchmarks.common.contestant_names import DISTILLED, UNPRUNED
from benchmarks.common.machine import commit, machine_conditions, median_seconds, parameters, sources_digest
from benchmarks.common.precision import precision_here
from benchmarks.contest.contestants import Contest, Finished, Stage, Start, tunable
from benchmarks.contest.gate import GATED, refusal_of
from benchmarks.contest.torch_pruning import PEERS
from benchmarks.contest.torch_pruning_check import impossible
from benchmarks.contest.training import cache_root, checkpoint
from benchmarks.contest.training_state import RunStates, folder_of, keeping_states
from benchmarks.contest.tuning import Trial, best_trial, missing_pushes
from benchmarks.tasks.base import Part, Recipe, Task
from etp_graph.errors import CheckpointError, EtpError

TUNING_SEED = 1_000
AT = "@"
"""Stands before a strength that is given and not tuned: ``torque@0.6``."""
FORMAT = 1
_ROUNDS = {"smoke": 2, "cpu": 12, "full": 30, "paper": 100}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One run. The unpruned control has the speed-up 1."""

    task: str
    scale: str
    method: str
    speed_up: float
    seed: int

    @property
    def base(self) -> str:
        """The contestant's name without the strength that a plan gives it: ``torque@0.6`` is ``torque``."""
        return self.method.partition(AT)[0]

    @property
    def given_push(self) -> float | None:
        """The strength that a plan gives; ``None``: it is tuned, or there is none."""
        return float(self.method.partition(AT)[2]) if AT in self.method else None

    def tuned_as(self, recipe: Recipe) -> Config:
        """The run whose trials give this one its strength: tuning has a seed, and may have a speed-up, of its own."""
        return replace(self, seed=TUNING_SEED, speed_up=recipe.tuned_at or self.speed_up)

    @property
    def key(self) -> tuple[str, str, str, float, int]:
        """What a finished run is recognised by."""
        return self.task, self.scale, self.method, float(self.speed_up), self.seed


class NotPossibleError(Exception):
    """The contestant cannot do this task; the message says why."""


class Protocol:
    """All runs on one task, from one checkpoint.

    Args:
        task: the task.
        blind: for studies: the test part is never read, and no latency is measured.
        resumable: whether a run that was killed continues from the states in the cache folder.
    """

    def __init__(self, task: Task, *, blind: bool = False, resumable: bool = False) -> None:
        self.task, self.blind, self.resumable = task, blind, resumable
        begin = perf_counter()
        self.start = Start(task, checkpoint(task))
        self.seed = 0
        self.seconds_checkpoint = perf_counter() - begin
        self._dense: dict[str, float] = {}

    def run(
        self, config: Config, *, trials: Sequence[Trial] = (), keep: Callable[[Trial], object] = lambda trial: None,
        controls: Sequence[tuple[float, float]] = (),
    ) -> dict[str, Any]:  # fmt: skip
        """One run as a record, ready for JSON.

        Args:
            config: what is run.
            trials: those that are there already, of an earlier seed or of a process that was killed.
            keep: is given each further trial as soon as it is over.
            controls: what earlier seeds of the dense control had on the validation part, before and after: a recipe is
                refused by the mean of all.
        """
        record: dict[str, Any] = {
            "format": FORMAT, "config": asdict(config), "title": self.task.title, "metric": asdict(self.task.metric),
            "recipe": asdict(self.task.recipe), "checkpoint": self.task.checkpoint_note,
            "precision": precision_here(self.task.recipe.precision, self.task.device.type),
            "conditions": machine_conditions(), "commit": commit(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        begin, states = perf_counter(), self._states(config, None)
        try:
            chosen = self._tuned(config, trials, keep)
            begin = perf_counter()  # a trial has seconds of its own
            record |= {"status": "ok", **self._measured(config, chosen, states, controls)}
        except NotPossibleError as error:
            record |= {"status": "not possible", "reason": str(error)}
        except FloatingPointError as error:
            record |= {"status": "failed", "reason": str(error)}
        before = 0.0 if states is None else states.seconds_before
        record["seconds"] = round(perf_counter() - begin + before, 1)
        return record

    def forget(self, config: Config, push: float | None = None) -> None:
        """Remove the states of a run that has its line, or of a trial (with its push) that has its own."""
        states = self._states(config, push)
        if states is not None:
            states.clear()

    def _states(self, config: Config, push: float | None) -> RunStates | None:
        """Where a run, or the trial of a push, keeps the state of its training."""
        if not self.resumable:
            return None
        settings = {
            "config": asdict(config), "push": push, "recipe": asdict(self.task.recipe), "title": self.task.title,
            "blind": self.blind, "sources": sources_digest(),
        }  # fmt: skip
        trial = "" if push is None else f"-trial-{push:g}"
        name = f"{config.task}-{config.scale}-{config.method}-{config.speed_up:g}-{config.seed}{trial}"
        return RunStates(folder_of(cache_root() / "states", name.replace("[", "(").replace("]", ")"), settings))

    def begin_with(self, seed: int) -> None:
        """Take the checkpoint of this seed, in tasks where each has its own."""
        if self.task.own_checkpoints and seed != self.seed:
            self.start, self.seed, self._dense = Start(self.task, checkpoint(self.task, seed)), seed, {}

    def tune(
        self, config: Config, trials: Sequence[Trial] = (), *, keep: Callable[[Trial], object] = lambda trial: None
    ) -> list[Trial]:
        """All trials of a contestant, those that are there and the missing ones; the test part is not looked at."""
        found = list(trials)
        while pushes := missing_pushes(found, self.task.recipe, config.base, self.task.metric):
            found.append(self.try_push(config.tuned_as(self.task.recipe), pushes[0]))
            keep(found[-1])
        return found

    def try_push(self, config: Config, push: float) -> Trial:
        """One trial: the whole run with this push (or learning rate), and its metric on the validation part."""
        self.begin_with(TUNING_SEED)
        task = copy.copy(self.task)
        task.recipe = self.task.recipe.trial()
        begin, states = perf_counter(), self._states(config, push)
        value, reason = None, None
        try:
            with keeping_states(states):
                value = self.task.evaluate(self._contest(task, config, TUNING_SEED, push, {}).model, "val")
        except FloatingPointError as error:
            reason = str(error)
        before = 0.0 if states is None else states.seconds_before
        return Trial(push=push, value=value, reason=reason, seconds=round(perf_counter() - begin + before, 1))

    def best(self, trials: Sequence[Trial]) -> float:
        """The push of the best trial; of equal ones the weakest."""
        best = best_trial(trials, self.task.metric)
        if best is None:
            raise FloatingPointError("training diverged in every trial")
        return best.push

    def _measured(
        self, config: Config, trials: Sequence[Trial], states: RunStates | None,
        controls: Sequence[tuple[float, float]],
    ) -> dict[str, Any]:  # fmt: skip
        begin, push = perf_counter(), config.given_push
        if push is None and trials:
            push = self.best(trials)
        self.begin_with(config.seed)
        stages: dict[Stage, nn.Module] = {}
        with keeping_states(states):
            finished = self._contest(self.task, config, config.seed, push, stages)
        trained = perf_counter() + (0.0 if states is None else states.seconds_before)
        model, macs = finished.model, finished.macs
        if macs is None or self.start.count.neutral:
            macs = self.start.count(model)
        stages.pop("dense", None)
        body: dict[str, Any] = {
            "macs": [self.start.macs, macs], "counted_by": self.start.count.by,
            "params": [parameters(self.start.dense), parameters(model)],
            "speed_up": self.start.macs / max(macs, 1), "push": push, "strength": finished.strength,
            "trials": [asdict(trial) for trial in trials],
            "phases": {"tune": sum(trial.seconds for trial in trials), "train": round(trained - begin, 1)},
        }  # fmt: skip
        if config.method == UNPRUNED and config.scale in GATED:
            body |= self._judged(model, controls)
        # With the networks finished and nothing left to choose, the test part is read.
        return body if body.get("status") == "refused" else {**body, **self._metrics(stages, model)}

    def _tuned(self, config: Config, trials: Sequence[Trial], keep: Callable[[Trial], object]) -> Sequence[Trial]:
        """The trials of a contestant whose strength is to be chosen; of others none."""
        self.require_possible(config)
        needed = config.given_push is None and tunable(config.base)
        return self.tune(config, trials, keep=keep) if needed else ()

    def require_possible(self, config: Config) -> None:
        """Raise :class:`NotPossibleError` where a peer is known to fail on this task."""
        if _peer(config.base):
            reason = impossible(config.task, config.scale)
            if reason is not None:
                raise NotPossibleError(reason)

    def _judged(self, control: nn.Module, controls: Sequence[tuple[float, float]]) -> dict[str, Any]:
        """A refusal with its figures, if the recipe harms the dense control; the test part is not read then."""
        pair = self._read(self.start.dense, "val"), self._read(control, "val")
        reason = refusal_of(asdict(self.task.metric), [*controls, pair])
        if reason is None:
            return {}
        return {"status": "refused", "reason": reason, "val": dict(zip(("dense", "finetuned"), pair, strict=True))}

    def _metrics(self, stages: dict[Stage, nn.Module], model: nn.Module) -> dict[str, Any]:
        """The metric of every stage on every part, and the latency."""
        parts: tuple[Part, ...] = ("val",) if self.blind else ("val", "test")
        if not self._dense:
            self._dense = {part: self._read(self.start.dense, part) for part in parts}
        found: dict[str, Any] = {
            part: {"dense": self._dense[part], **{stage: self._read(net, part) for stage, net in stages.items()}}
            for part in parts
        }
        if self.blind:
            return found
        models, rounds = [self.start.dense, model], _ROUNDS[self.task.scale]
        latency = median_seconds(models, self.task.latency_inputs(), repetitions=rounds)
        return {**found, "details": self.task.details(model, "test"), "latency": latency}

    def _read(self, model: nn.Module, part: Any) -> float:
        return float(self.task.evaluate(model, part))

    def _contest(
        self, task: Task, config: Config, seed: int, push: float | None, stages: dict[Stage, nn.Module]
    ) -> Finished:
        """The contestant's network; what it looked like at each stage goes to ``stages`` in a full run."""

        def watch(stage: Stage, model: nn.Module) -> None:
            if task is self.task:
                stages[stage] = copy.deepcopy(model)

        speed_up = 1.0 if config.base.removesuffix(DISTILLED) == UNPRUNED else config.speed_up
        contest = Contest(self.start, task, speed_up=speed_up, seed=seed, watch=watch)
        try:
            return contest.run(config.base, push)
        except (FloatingPointError, CheckpointError):  # a state that cannot be kept says nothing about the contestant
            raise
        except (EtpError, ValueError) as error:
            # Out of reach, no batch norms to read, no force that acts: a property of method and model.
            raise NotPossibleError(f"{type(error).__name__}: {error}") from error
        except Exception as error:
            # The boundary to the peers: whatever their code raises on a model is a result about that model. Errors in
            # anything else are raised.
            if not _peer(config.base):
                raise
            raise NotPossibleError(f"Torch-Pruning raises {type(error).__name__}: {error}") from error


def _peer(name: str) -> bool:
    return name.removesuffix(DISTILLED) in PEERS
