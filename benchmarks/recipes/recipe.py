"""Choose the learning rate of a recipe by the dense control alone, on the validation part.

``python -m benchmarks contest recipe cifar10`` trains the unpruned network for as many steps as every method takes,
under each of a few learning rates, and writes a JSON line for each in ``benchmarks/results/runs/recipes/TASK.jsonl``.
No pruning method and no test part has a say. With ``--precisions bf16 fp32`` the rates are tried in the first
precision, and the best one in the other: a recipe in bf16 is backed by a line that says what it costs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.contestant_names import UNPRUNED
from benchmarks.common.machine import commit, machine_conditions
from benchmarks.common.precision import Precision, precision_here
from benchmarks.common.records import RUNS, Record, append_record, read_records
from benchmarks.contest.gate import allowed_loss, loss_of
from benchmarks.contest.ledger import as_json
from benchmarks.contest.protocol import TUNING_SEED, Config, Protocol
from benchmarks.tasks import SCALES, TASKS, TaskUnavailableError, make
from benchmarks.tasks.base import Recipe, concerns

RECIPES = "recipes"
"""Folder of the lines, beside those of the runs."""
MULTIPLES = (1.0, 0.5, 0.25, 2.0)
"""Rates that are tried, as multiples of the recipe's own rate of the sparse phase."""
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def with_rate(recipe: Recipe, rate: float, precision: Precision) -> Recipe:
    """The recipe at full length, with one peak of the learning rate in both phases."""
    return replace(recipe, sparse_rate=rate, finetune_rate=rate, precision=precision, tune_share=1.0)


def find(lines: Sequence[Record], recipe: Recipe) -> Record | None:
    """The line of this recipe; ``None``: it was not tried."""
    same = concerns(as_json(recipe), UNPRUNED)
    return next((line for line in lines if concerns(line["recipe"], UNPRUNED) == same), None)


def best_line(lines: Sequence[Record], *, higher: bool) -> Record | None:
    """The line with the best control; a diverged one is never it."""
    found = [line for line in lines if line["value"] is not None]
    return max(found, key=lambda line: line["value"] if higher else -line["value"], default=None)


def try_recipe(protocol: Protocol, recipe: Recipe) -> Record:
    """The dense control under this recipe, with the seed of tuning, as a line."""
    task = protocol.task
    task.recipe = recipe
    config = Config(task=task.name, scale=task.scale, method=UNPRUNED, speed_up=1.0, seed=TUNING_SEED)
    trial = protocol.try_push(config, recipe.sparse_rate)
    before = task.evaluate(protocol.start.dense, "val")
    metric = {"name": task.metric.name, "higher": task.metric.higher, "percent": task.metric.percent}
    lost = None if trial.value is None else loss_of(metric, before, trial.value)
    return {
        "task": task.name, "scale": task.scale, "title": task.title, "metric": metric, "recipe": as_json(recipe),
        "checkpoint": before, "value": trial.value, "lost": lost, "allowed": allowed_loss(metric),
        "reason": trial.reason, "seconds": trial.seconds, "seed": TUNING_SEED, "commit": commit(),
        "conditions": machine_conditions(),
    }  # fmt: skip


def search(
    protocol: Protocol, rates: Sequence[float], precisions: Sequence[Precision], out: Path, *, console: Console
) -> list[Record]:
    """Try what has no line yet: all rates in the first precision, then the best one in the others."""
    own, lines = protocol.task.recipe, read_records(out)

    def tried(rate: float, precision: Precision) -> Record:
        recipe = with_rate(own, rate, precision)
        line = find(lines, recipe)
        if line is None:
            line = try_recipe(protocol, recipe)
            append_record(out, line)
            lines.append(line)
            console.print(table([line]))
        return line

    found = [tried(rate, precisions[0]) for rate in rates]
    best = best_line(found, higher=protocol.task.metric.higher)
    if best is not None:
        found += [tried(best["recipe"]["sparse_rate"], precision) for precision in precisions[1:]]
    return found


def table(lines: Sequence[Record]) -> Table:
    """The lines as a table; a star: the best."""
    metric = lines[0]["metric"]
    by, best = (100 if metric["percent"] else 1), best_line(lines, higher=metric["higher"])
    shown = Table(title=f"{lines[0]['title']}: dense control, {metric['name']} on the validation part")
    for column in ("rate", "precision", "checkpoint", "control", "lost", "allowed", "minutes"):
        shown.add_column(column, justify="right")
    for line in lines:
        value, recipe = line["value"], line["recipe"]
        shown.add_row(
            f"{recipe['sparse_rate']:g}", recipe["precision"], f"{by * line['checkpoint']:.2f}",
            "diverged" if value is None else f"{by * value:.2f}{'*' if line is best and len(lines) > 1 else ''}",
            "-" if line["lost"] is None else f"{100 * line['lost']:+.2f}", f"{100 * line['allowed']:.2f}",
            f"{line['seconds'] / 60:.0f}",
        )  # fmt: skip
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    import torch

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks contest recipe", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--rates", nargs="+", type=float, metavar="X", help="default: 1, 1/2, 1/4 and 2 times its own")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp32"], help="default fp32")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--out", type=Path, default=RUNS, help=f"folder of the runs, default {RUNS}")
    options: Any = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console(stderr=True)
    try:
        protocol = Protocol(make(options.task, options.scale), resumable=True)
    except TaskUnavailableError as error:
        parser.exit(2, f"{options.task}: {error}\n")
    for precision in options.precisions:
        if precision_here(precision, protocol.task.device.type) != precision:
            parser.error(f"--precisions {precision}: this processor emulates it; leave it out")
    rates = options.rates or [multiple * protocol.task.recipe.sparse_rate for multiple in MULTIPLES]
    out = options.out / RECIPES / f"{options.task}.jsonl"
    console.print(table(search(protocol, rates, options.precisions, out, console=console)))
