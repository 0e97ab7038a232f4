"""What a comparison is; the one place that says so.

Every contestant begins with the same checkpoint, sees the same batches in the same order, takes the same number of
optimizer steps at the same learning rates, and is cut to the same MACs. A contestant with a strength has it chosen on
the validation part, by the same number of trials on the same shorter schedule, with a seed that no run has. The test
part is read once for each finished network, after everything else. Every run is one record.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

from torch import nn

from benchmarks.common.contestant_names import DISTILLED, SMALL, UNPRUNED
from benchmarks.common.machine import commit, machine_conditions, median_seconds, parameters
from benchmarks.contest.contestants import RATES, Contest, Finished, Stage, Start, tunable
from benchmarks.contest.torch_pruning import PEERS
from benchmarks.contest.torch_pruning_check import impossible
from benchmarks.contest.training import checkpoint
from benchmarks.tasks.base import Part, Task
from etp_graph.errors import EtpError

TUNING_SEED = 1_000
FORMAT = 1
_ROUNDS = {"smoke": 2, "cpu": 12, "paper": 100}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One run. The unpruned control has the speed-up 1."""

    task: str
    scale: str
    method: str
    speed_up: float
    seed: int

    @property
    def key(self) -> tuple[str, str, str, float, int]:
        """What a finished run is recognised by."""
        return self.task, self.scale, self.method, float(self.speed_up), self.seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A strength that was tried: the push, the metric on the validation part (``None``: training failed), why."""

    push: float
    value: float | None
    reason: str | None = None


class NotPossibleError(Exception):
    """The contestant cannot do this task; the message says why."""


class Protocol:
    """All runs on one task, from one checkpoint.

    Args:
        task: the task.
        blind: for studies: the test part is never read, and no latency is measured.
    """

    def __init__(self, task: Task, *, blind: bool = False) -> None:
        self.task, self.blind = task, blind
        begin = perf_counter()
        self.start = Start(task, checkpoint(task))
        self.seed = 0
        self.seconds_checkpoint = perf_counter() - begin
        self._dense: dict[str, float] = {}

    def run(self, config: Config, *, trials: Sequence[Trial] = ()) -> dict[str, Any]:
        """One run as a record, ready for JSON; ``trials``: those of an earlier seed, which tuned the same."""
        record: dict[str, Any] = {
            "format": FORMAT, "config": asdict(config), "title": self.task.title, "metric": asdict(self.task.metric),
            "recipe": asdict(self.task.recipe), "checkpoint": self.task.checkpoint_note,
            "conditions": machine_conditions(), "commit": commit(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        begin = perf_counter()
        try:
            record |= {"status": "ok", **self._measured(config, trials)}
        except NotPossibleError as error:
            record |= {"status": "not possible", "reason": str(error)}
        except FloatingPointError as error:
            record |= {"status": "failed", "reason": str(error)}
        record["seconds"] = round(perf_counter() - begin, 1)
        return record

    def begin_with(self, seed: int) -> None:
        """Take the checkpoint of this seed, in tasks where each has its own."""
        if self.task.own_checkpoints and seed != self.seed:
            self.start, self.seed, self._dense = Start(self.task, checkpoint(self.task, seed)), seed, {}

    def tune(self, config: Config) -> list[Trial]:
        """Every push of the recipe (or learning rate) on the short schedule; the test part is not looked at."""
        self.begin_with(TUNING_SEED)
        short = copy.copy(self.task)
        short.recipe = self.task.recipe.trial()
        found = []
        fresh = config.method.removesuffix(DISTILLED) == SMALL
        for push in RATES if fresh else self.task.recipe.pushes:
            try:
                finished = self._contest(short, config, TUNING_SEED, push, {})
                found.append(Trial(push=push, value=self.task.evaluate(finished.model, "val")))
            except FloatingPointError as error:
                found.append(Trial(push=push, value=None, reason=str(error)))
        return found

    def best(self, trials: Sequence[Trial]) -> float:
        """The push of the best trial; of equal ones the weakest."""
        best: Trial | None = None
        for trial in sorted(trials, key=lambda one: one.push):
            if trial.value is None:
                continue
            if best is None or best.value is None or self.task.metric.better(trial.value, best.value):
                best = trial
        if best is None:
            raise FloatingPointError("training diverged in every trial")
        return best.push

    def _measured(self, config: Config, trials: Sequence[Trial]) -> dict[str, Any]:
        if _peer(config.method):
            reason = impossible(config.task, config.scale)
            if reason is not None:
                raise NotPossibleError(reason)
        begin = perf_counter()
        push = None
        if tunable(config.method):
            trials = list(trials) or self.tune(config)
            push = self.best(trials)
        tuned = perf_counter()
        self.begin_with(config.seed)
        stages: dict[Stage, nn.Module] = {}
        finished = self._contest(self.task, config, config.seed, push, stages)
        trained = perf_counter()
        model, macs = finished.model, finished.macs
        if macs is None or self.start.count.neutral:
            macs = self.start.count(model)
        # With the networks finished and nothing left to choose, the test part is read.
        stages.pop("dense", None)
        return {
            **self._metrics(stages, model),
            "macs": [self.start.macs, macs], "counted_by": self.start.count.by,
            "params": [parameters(self.start.dense), parameters(model)],
            "speed_up": self.start.macs / max(macs, 1), "push": push, "strength": finished.strength,
            "trials": [asdict(trial) for trial in trials],
            "phases": {"tune": round(tuned - begin, 1), "train": round(trained - tuned, 1)},
        }  # fmt: skip

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

        speed_up = 1.0 if config.method.removesuffix(DISTILLED) == UNPRUNED else config.speed_up
        contest = Contest(self.start, task, speed_up=speed_up, seed=seed, watch=watch)
        try:
            return contest.run(config.method, push)
        except FloatingPointError:
            raise
        except (EtpError, ValueError) as error:
            # Out of reach, no batch norms to read, no force that acts: a property of method and model.
            raise NotPossibleError(f"{type(error).__name__}: {error}") from error
        except Exception as error:
            # The boundary to the peers: whatever their code raises on a model is a result about that model. Errors in
            # anything else are raised.
            if not _peer(config.method):
                raise
            raise NotPossibleError(f"Torch-Pruning raises {type(error).__name__}: {error}") from error


def _peer(name: str) -> bool:
    return name.removesuffix(DISTILLED) in PEERS
