"""How the weight decay of a task's recipe was chosen: by the unpruned network alone, on the validation part.

``python -m benchmarks weight-decay cora tolokers`` trains the checkpoint and then both phases without any pruning under
each weight decay, and prints what each leaves. Nothing of a pruning method, and no test part, has a say in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from benchmarks.common.markdown import as_row
from benchmarks.contest.training import train
from benchmarks.tasks import SCALES, TASKS, TaskUnavailableError, make
from benchmarks.tasks.base import Task

DECAYS = (5e-4, 0.3, 1.0, 3.0, 10.0)
PHASES = ("checkpoint", "sparse phase", "fine-tuned")


def stages(task: Task, decay: float, *, seed: int) -> tuple[float, ...]:
    """The metric on the validation part after each of :data:`PHASES`, all of them unpruned."""
    recipe = task.recipe
    torch.manual_seed(seed)
    model, found, start = task.start().to(task.device), [], 0
    for steps, peak in (
        (recipe.dense_steps, recipe.dense_rate),
        (recipe.sparse_steps, recipe.sparse_rate),
        (recipe.finetune_steps, recipe.finetune_rate),
    ):
        train(task, model, steps=steps, peak=peak, seed=seed, start=start, weight_decay=decay)
        found.append(task.evaluate(model, "val"))
        start += steps
    return tuple(found)


def table(task: Task, decays: Sequence[float], *, seed: int) -> str:
    """One row for each weight decay; the recipe's own in bold."""
    by = 100 if task.metric.percent else 1
    rows = [as_row(("weight decay", *PHASES)), "| ---: |" + " ---: |" * len(PHASES)]
    for decay in decays:
        name = f"**{decay:g}**" if decay == task.recipe.weight_decay else f"{decay:g}"
        rows.append(as_row((name, *(f"{by * value:.2f}" for value in stages(task, decay, seed=seed)))))
    return "\n".join([f"{task.title}, {task.metric.name} on the validation part, seed {seed}", "", *rows, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks weight-decay", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("tasks", nargs="+", choices=list(TASKS))
    parser.add_argument("--weight-decays", nargs="+", type=float, default=list(DECAYS), metavar="X")
    parser.add_argument("--seed", type=int, default=1000, help="default 1000, that of tuning")
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in options.tasks:
        try:
            task = make(name, options.scale)
        except TaskUnavailableError as error:
            parser.exit(2, f"{name}: {error}\n")
        print(table(task, options.weight_decays, seed=options.seed))
