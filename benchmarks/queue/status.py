"""Show what of the planned runs is done, and the hours left: ``python -m benchmarks contest status``.

The hours come from the seconds of finished runs and trials of the same task; without any, from a few training steps.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.table import Table

from benchmarks.common.records import Record, read_records
from benchmarks.contest.contestants import tunable
from benchmarks.contest.ledger import TRIALS, Ledger
from benchmarks.contest.protocol import Config
from benchmarks.contest.run import is_known, scale_of
from benchmarks.contest.training import train
from benchmarks.queue.locks import holder
from benchmarks.queue.plan import Experiment, Planned, chosen, planned_runs
from benchmarks.queue.queue import LOCKS, Job, add_choice
from benchmarks.tasks import Task, TaskUnavailableError, make

STEPS = 3
"""Training steps of an estimate, after one that is not counted."""


GRID = 4
"""Trials of a strength in all recipes of the scale ``full``, without extensions."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far an experiment is.

    Attributes:
        done: runs that have a line.
        without_result: those of them whose line has no figures.
        running: jobs that a queue is at.
        missing: runs without a line whose method is known.
        unknown: runs of methods that do not exist yet.
        trials: trials that the missing runs still need, at least.
        seconds: of a run, measured or estimated; ``None``: nobody knows.
        measured: whether ``seconds`` comes from finished runs.
        spent: seconds of all that is done.
    """

    done: int = 0
    without_result: int = 0
    running: int = 0
    missing: int = 0
    unknown: int = 0
    trials: int = 0
    seconds: float | None = None
    measured: bool = False
    spent: float = 0.0

    @property
    def hours_left(self) -> float | None:
        """Hours of one thread for what is missing."""
        return None if self.seconds is None else (self.missing + self.trials) * self.seconds / 3600


def progress_of(experiment: Experiment, planned: Sequence[Planned], folder: Path, *, estimate: bool) -> Progress:
    """Count the runs of an experiment."""
    own = [each.config for each in planned if each.experiment is experiment]
    ledger, found = Ledger(folder / f"{experiment.task}.jsonl"), Progress()
    lines = [record for record in map(ledger.find, own) if record is not None]
    trials = _trials_of(experiment, folder)
    tuned: set[tuple[str, float]] = set()
    for config in own:
        if (record := ledger.find(config)) is not None:
            found.done += 1
            found.without_result += record["status"] != "ok"
            continue
        if not is_known(config.method):
            found.unknown += 1
            continue
        found.missing += 1
        found.running += holder(folder / LOCKS, Job(config=config).name) is not None
        if config.given_push is None and tunable(config.base) and not _has_trials(lines, config):
            tuned.add((config.method, config.speed_up))
    found.running += sum(holder(folder / LOCKS, file.stem) is not None for file in _trial_locks(experiment, folder))
    had = sum((line["config"]["method"], line["config"]["speed_up"]) in tuned for line in trials)
    found.trials = max(0, GRID * len(tuned) - had)
    task = _task_of(experiment) if estimate and found.missing else None
    if task is not None and task.recipe.tuned_at:
        tuned = {(method, task.recipe.tuned_at) for method, _ in tuned}
    seconds = [line["seconds"] for line in lines if line["status"] == "ok"] + [t["trial"]["seconds"] for t in trials]
    found.spent = sum(line["seconds"] for line in lines) + sum(line["trial"]["seconds"] for line in trials)
    found.measured = bool(seconds)
    if seconds:
        found.seconds = statistics.fmean(seconds)
    elif task is not None:
        found.seconds = seconds_of_run(task)
    return found


def _has_trials(lines: Sequence[Record], config: Config) -> bool:
    """Whether another seed of this run was tuned."""
    same = {**asdict(config), "seed": None}
    return any(line.get("trials") and {**line["config"], "seed": None} == same for line in lines)


def _trials_of(experiment: Experiment, folder: Path) -> list[Record]:
    lines = read_records(folder / TRIALS / f"{experiment.task}.jsonl")
    return [line for line in lines if line["config"]["scale"] == experiment.scale]


def _trial_locks(experiment: Experiment, folder: Path) -> list[Path]:
    return sorted((folder / LOCKS).glob(f"{experiment.task}-{experiment.scale}-*-trial-*.lock"))


def _task_of(experiment: Experiment) -> Task | None:
    """The task; ``None``: its data are not here."""
    try:
        return make(experiment.task, scale_of(experiment.scale))
    except TaskUnavailableError:
        return None


def seconds_of_run(task: Task) -> float:
    """Estimate the seconds of a run from a few steps of the dense network with fresh weights."""
    model = task.build().to(task.device)
    train(task, model, steps=1, peak=1e-6, seed=0, start=0)
    begin = perf_counter()
    train(task, model, steps=STEPS, peak=1e-6, seed=0, start=1)
    step = (perf_counter() - begin) / STEPS
    return step * (task.recipe.sparse_steps + task.recipe.finetune_steps)


def table(found: Sequence[tuple[Experiment, Progress]]) -> Table:
    """The table of all experiments."""
    shown = Table(title="planned runs")
    for column in ("", "task"):
        shown.add_column(column)
    for column in (
        "done",
        "no result",
        "running",
        "missing",
        "no method yet",
        "trials",
        "min a run",
        "h spent",
        "h left",
    ):
        shown.add_column(column, justify="right")
    for experiment, one in found:
        minutes = "?" if one.seconds is None else f"{one.seconds / 60:.0f}" + ("" if one.measured else " (est.)")
        left = "?" if one.hours_left is None and one.missing else f"{one.hours_left or 0:.1f}"
        counts = (one.done, one.without_result, one.running, one.missing, one.unknown, one.trials)
        shown.add_row(experiment.name, experiment.task, *map(str, counts), minutes, f"{one.spent / 3600:.1f}", left)
    left = sum(one.hours_left or 0 for _, one in found)
    spent = sum(one.spent for _, one in found) / 3600
    shown.add_section()
    sums = [sum(getattr(one, name) for _, one in found) for name in _COUNTS]
    unknown = any(one.hours_left is None and one.missing for _, one in found)
    shown.add_row("all", "", *map(str, sums), "", f"{spent:.1f}", f"{left:.1f}{' + ?' if unknown else ''}")
    return shown


_COUNTS = ("done", "without_result", "running", "missing", "unknown", "trials")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    import torch

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks contest status", description=(__doc__ or "").splitlines()[0]
    )
    add_choice(parser)
    parser.add_argument("--no-estimate", action="store_true", help="train nothing: no hours for tasks without any run")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    experiments = chosen(options.experiments, options.tasks)
    planned = planned_runs(experiments)
    found = [(e, progress_of(e, planned, options.out, estimate=not options.no_estimate)) for e in experiments]
    Console().print(table(found))
