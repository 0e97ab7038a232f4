"""Take up what is missing of the planned runs: ``python -m benchmarks contest queue``.

One process, one thread, the lowest priority. Every run and every trial writes its line as soon as it is over. A queue
that is killed loses at most the last pass over the data; the next queue continues there. Queues side by side share the
work. A run that cannot be done (no such method yet, no data, a refused recipe) is passed over with a note.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from time import monotonic, sleep
from traceback import format_exc

from rich.console import Console

from benchmarks.common.contestant_names import UNPRUNED
from benchmarks.common.records import RUNS
from benchmarks.contest.contestants import tunable
from benchmarks.contest.gate import GATED
from benchmarks.contest.ledger import Ledger
from benchmarks.contest.protocol import Config, NotPossibleError, Protocol
from benchmarks.contest.run import describe, is_known, run_one, scale_of
from benchmarks.contest.tuning import missing_pushes
from benchmarks.queue.locks import hold_lock, holder
from benchmarks.queue.plan import BY_NAME, Planned, chosen, planned_runs
from benchmarks.tasks import CONDITIONS, TASKS, Metric, Recipe, Task, TaskUnavailableError, make

LOCKS = ".locks"
"""Folder of the locks, beside the lines."""
WAIT = 30.0
"""Seconds after which a queue looks again, if others are at all that is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run, or one trial of its strength (``push``)."""

    config: Config
    push: float | None = None

    @property
    def name(self) -> str:
        """A plain word for the lock. A trial serves all seeds of its run."""
        config = self.config
        own = f"seed-{config.seed}" if self.push is None else f"trial-{self.push:g}"
        return f"{config.task}-{config.scale}-{config.method}-{config.speed_up:g}-{own}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the queue has to know of a task when its data are not in memory."""

    recipe: Recipe
    metric: Metric


class Queue:
    """The lines of all tasks in a folder, and the task whose data are in memory.

    Args:
        folder: of the lines.
        console: is told what is done and what is passed over.
    """

    def __init__(self, folder: Path, *, console: Console) -> None:
        self.folder, self.console = folder, console
        self._ledgers: dict[str, Ledger] = {}
        self._facts: dict[tuple[str, str], Facts | str] = {}
        self._loaded: tuple[tuple[str, str], Task] | None = None
        self._protocol: Protocol | None = None
        self._noted: set[str] = set()
        self._broken: set[str] = set()

    def ledger(self, task: str) -> Ledger:
        """The lines of a task."""
        if task not in self._ledgers:
            self._ledgers[task] = Ledger(self.folder / f"{task}.jsonl")
        return self._ledgers[task]

    def jobs(self, planned: Sequence[Planned]) -> Iterator[Job]:
        """What can be done now, in the order of the plan."""
        for config in (each.config for each in planned):
            facts = self._facts_of(config) if is_known(config.method) else "no such method yet"
            if isinstance(facts, str):
                self.note(f"{config.task} {config.method} is passed over: {facts}")
                continue
            yield from (job for job in self._jobs_of(config, facts) if job.name not in self._broken)

    def _jobs_of(self, config: Config, facts: Facts) -> Iterator[Job]:
        """The run, or the trials that it waits for; nothing if it has its line or cannot be done now."""
        ledger, recipe = self.ledger(config.task), facts.recipe
        if ledger.find(config, recipe) is not None:
            return
        if config.method != UNPRUNED and config.scale in GATED:
            if not ledger.controls(config, recipe):
                return  # the control comes first in the plan: another queue is at it
            reason = ledger.refusal(config, recipe)
            if reason is not None:
                self.note(f"{config.task} is passed over, its recipe is refused: {reason}")
                return
        if config.given_push is None and tunable(config.base):
            trials = ledger.trials(config, recipe)
            pushes, tuned = missing_pushes(trials, recipe, config.base, facts.metric), config.tuned_as(recipe)
            if pushes and self._is_impossible(tuned):
                self.note(
                    f"{describe(config)} is passed over: its strength is tuned at {tuned.speed_up:g}x, not possible"
                )
                return
            if pushes:
                yield from (Job(config=replace(tuned, seed=config.seed), push=push) for push in pushes)
                return
        yield Job(config=config)

    def _is_impossible(self, tuned: Config) -> bool:
        """Whether a run of any seed at the speed-up of tuning says that there is no network."""
        seeds = {record["config"]["seed"] for record in self.ledger(tuned.task).runs}
        found = [self.ledger(tuned.task).find(replace(tuned, seed=seed)) for seed in seeds]
        return any(record is not None and record["status"] == "not possible" for record in found)

    def work(self, planned: Sequence[Planned]) -> bool:
        """Do the first job that no other queue has; whether there was one."""
        for ledger in self._ledgers.values():
            ledger.refresh()
        for job in self.jobs(planned):
            with hold_lock(self.folder / LOCKS, job.name) as mine:
                if not mine:
                    continue
                self.ledger(job.config.task).refresh()  # its holder may have finished it a moment ago
                facts = self._facts_of(job.config)
                assert isinstance(facts, Facts)
                if job in self._jobs_of(job.config, facts):
                    self._do(job)
                return True
        return False

    def is_busy(self) -> bool:
        """Whether another queue is at work in this folder, after which more may be possible."""
        return any(holder(self.folder / LOCKS, file.stem) for file in (self.folder / LOCKS).glob("*.lock"))

    def _do(self, job: Job) -> None:
        """Do a job. An error of ours is no result: it is shown, and the job is left alone."""
        try:
            self._try(job)
        except Exception:  # noqa: BLE001 - the other jobs do not depend on it
            self._broken.add(job.name)
            self.console.print(f"{describe(job.config)} raised an error and is left alone:", markup=False)
            self.console.print(format_exc(), highlight=False, markup=False)

    def _try(self, job: Job) -> None:
        config, protocol, ledger = job.config, self._protocol_of(job.config), self.ledger(job.config.task)
        if job.push is None:
            run_one(protocol, config, ledger, console=self.console)
            return
        try:
            protocol.require_possible(config)
            trial = protocol.try_push(config, job.push)
        except NotPossibleError:
            run_one(protocol, config, ledger, console=self.console)  # writes the line that says why
            return
        ledger.write_trial(config, protocol.task.recipe, trial)
        protocol.forget(config, job.push)
        what = f"{describe(config)}, trial of {job.push:g}"
        self.console.print(f"{what}: {trial.value} on the validation part; {trial.seconds:.0f} s", highlight=False)

    def _protocol_of(self, config: Config) -> Protocol:
        task = self._task(config)
        if self._protocol is None or self._protocol.task is not task:
            self._protocol = None  # lets the data of the other task go
            self._protocol = Protocol(task, resumable=True)
        return self._protocol

    def _task(self, config: Config) -> Task:
        """The task; the data of one are in memory at a time."""
        key = config.task, config.scale
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None
            self._loaded = key, make(config.task, scale_of(config.scale))
        return self._loaded[1]

    def _facts_of(self, config: Config) -> Facts | str:
        """Recipe and metric of the task, or why it is unavailable."""
        key = config.task, config.scale
        if key not in self._facts:
            try:
                task = self._task(config)
                self._facts[key] = Facts(recipe=task.recipe, metric=task.metric)
            except TaskUnavailableError as error:
                self._facts[key] = str(error)
        return self._facts[key]

    def note(self, text: str) -> None:
        """Say something once."""
        if text not in self._noted:
            self._noted.add(text)
            self.console.print(text, highlight=False, markup=False)


def add_choice(parser: argparse.ArgumentParser) -> None:
    """The arguments that choose experiments, which queue and status share."""
    parser.add_argument("--experiments", nargs="+", choices=list(BY_NAME), metavar="NAME", help=", ".join(BY_NAME))
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, *CONDITIONS], metavar="TASK", help="only those of these")
    parser.add_argument("--out", type=Path, default=RUNS, help=f"folder of the lines, default {RUNS}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    import torch

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks contest queue", description=(__doc__ or "").splitlines()[0]
    )
    add_choice(parser)
    parser.add_argument("--hours", type=float, help="begin nothing new after these hours")
    parser.add_argument("--list", action="store_true", help="print the planned runs that have no line, in their order")
    options = parser.parse_args(arguments)
    planned = planned_runs(chosen(options.experiments, options.tasks))
    console = Console(stderr=not options.list)
    queue = Queue(options.out, console=console)
    if options.list:
        for each in planned:
            if queue.ledger(each.config.task).find(each.config) is None:
                name = "" if is_known(each.config.method) else " (no such method yet)"
                console.print(f"{each.experiment.name}: {describe(each.config)}{name}", highlight=False, markup=False)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # of the process that checks the peers
    torch.set_num_threads(1)
    os.nice(19)
    try:
        console.print(work_off(queue, planned, hours=options.hours))
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command continues\n")


def work_off(queue: Queue, planned: Sequence[Planned], *, hours: float | None = None) -> str:
    """Do one job after the other; the reason why it ended."""
    end = inf if hours is None else monotonic() + 3600 * hours
    while monotonic() < end:
        if queue.work(planned):
            continue
        if not queue.is_busy():
            return "nothing is left to take up"
        sleep(WAIT)
    return "the time is over"
