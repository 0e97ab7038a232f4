"""The lines of one task: its runs, and beside them the trials with which strengths are tuned.

A line is written as soon as its run or trial is over, so that nothing that was computed is computed again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common.records import Record, append_record, read_records
from benchmarks.contest.gate import controls, refusal
from benchmarks.contest.protocol import Config
from benchmarks.contest.tuning import Trial
from benchmarks.tasks.base import Recipe, concerns

TRIALS = "trials"
"""Folder of the trials beside the files of the runs."""


def as_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a record holds it."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return found


class Ledger:
    """The lines of a task.

    Args:
        file: of the runs; the trials are in ``trials/`` beside it.

    Attributes:
        runs: all records of runs, those of other scales and recipes too.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.runs: list[Record] = []
        self._trials: list[Record] = []
        self.refresh()

    def refresh(self) -> None:
        """Read what other processes wrote since."""
        self.runs = read_records(self.file)
        self._trials = read_records(self._trial_file)

    @property
    def _trial_file(self) -> Path:
        return self.file.parent / TRIALS / self.file.name

    def find(self, config: Config, recipe: Recipe | None = None) -> Record | None:
        """The last line of a run; ``None``: it has none. With ``recipe``: of a run under that recipe."""
        found = [record for record in self.runs if Config(**record["config"]).key == config.key]
        if recipe is not None:
            same = concerns(as_json(recipe), config.method)
            found = [record for record in found if concerns(record["recipe"], config.method) == same]
        return found[-1] if found else None

    def refusal(self, config: Config, recipe: Recipe) -> str | None:
        """Why the recipe of this run is refused, see :func:`benchmarks.contest.gate.refusal`."""
        return refusal(self._of_scale(config), recipe)

    def _of_scale(self, config: Config) -> list[Record]:
        """The runs of the task at the same scale; a file may hold other tasks, too."""
        return [r for r in self.runs if (r["config"]["task"], r["config"]["scale"]) == (config.task, config.scale)]

    def controls(self, config: Config, recipe: Recipe) -> list[Record]:
        """The lines of the dense control under this recipe."""
        return controls(self._of_scale(config), as_json(recipe))

    def trials(self, config: Config, recipe: Recipe) -> list[Trial]:
        """The trials of a contestant under this recipe, see :meth:`~benchmarks.contest.protocol.Config.tuned_as`."""
        same, key = concerns(as_json(recipe), config.method), config.tuned_as(recipe).key

        def fits(lines: Iterable[Record]) -> list[Record]:
            return [
                line for line in lines
                if concerns(line["recipe"], config.method) == same
                and Config(**line["config"]).tuned_as(recipe).key == key
            ]  # fmt: skip

        in_runs = [Trial(**trial) for line in fits(self.runs) for trial in line.get("trials", ())]
        own = [Trial(**line["trial"]) for line in fits(self._trials)]
        return list({trial.push: trial for trial in [*own, *in_runs]}.values())

    def write_run(self, record: Record) -> None:
        """Append the line of a run."""
        append_record(self.file, record)
        self.runs.append(json.loads(json.dumps(record)))

    def write_trial(self, config: Config, recipe: Recipe, trial: Trial) -> None:
        """Append the line of a trial."""
        body = {
            "config": asdict(config.tuned_as(recipe)), "recipe": as_json(recipe), "trial": asdict(trial)
        }  # fmt: skip
        append_record(self._trial_file, body)
        self._trials.append(json.loads(json.dumps(body)))
