"""Figures 1 and 3 of the paper on ETP: the norms of two units far from the pivot over the steps of sparse training.

The paper shows filters 150 and 254 of a layer of 256 filters of VGG-19 under Torque, whose norm at 254 stays at .134,
and under ETP, where it is 0 at the end.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import figures as plots
from benchmarks.contest.contestants import Start, library_method
from benchmarks.contest.strength import reference
from benchmarks.contest.training import checkpoint, train
from benchmarks.tasks.base import Task
from etp_graph import Budget
from etp_graph.methods import Method
from etp_graph.units import Units

METHODS = ("torque-published", "etp-paper", "etp")
DISTANCES = (150, 254)
OF_UNITS = 256
"""The paper's filters, and how many its layer has; other groups have their units at the same share of the way."""
PUSH = 1.5
"""Strength of the methods that have one, see :mod:`benchmarks.contest.strength`."""


def draw_norms(task: Task, out: Path) -> Path:
    """Train under each of :data:`METHODS`, draw the norms of the two units over the steps, and return the file."""
    import matplotlib as mpl

    start = Start(task, checkpoint(task))
    group, span = max(((g, s) for g, s in start.plan.spans() if g.locked is None), key=lambda pair: pair[0].n_units)
    found = {name: norms_over_steps(task, start, name, span) for name in METHODS}
    with mpl.rc_context(plots.STYLE):
        figure, axes = plots.new_figure(columns=len(DISTANCES))
        for ax, distance in zip(axes, DISTANCES, strict=True):
            _draw(ax, found, at=round(distance / (OF_UNITS - 1) * (group.n_units - 1)), title=group.name)
        axes[0].set_ylabel("norm of the unit")
        axes[0].legend()
        path = out / "images" / f"figure3-{task.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})
    return path


def _draw(ax: Any, found: dict[str, Tensor], *, at: int, title: str) -> None:
    for name, norms in found.items():
        ax.plot(norms[:, at].tolist(), linewidth=1.2, label=name)
    ax.set_title(f"{title}, unit {at}")
    ax.set_xlabel("step")


def norms_over_steps(task: Task, start: Start, name: str, span: slice) -> Tensor:
    """Train a copy of the checkpoint under the force of a method; norms of a group's units, [steps + 1, units]."""
    method = library_method(name)
    assert method is not None
    steps, model = task.recipe.sparse_steps, copy.deepcopy(start.dense)
    if not method.steered:
        method = replace(method, beta=PUSH * reference(task, model, start.plan, method))
    regularizer = method.regularizer(model, start.plan, steps=steps, budget=_budget(method, task))
    assert regularizer is not None
    units = Units(model, start.plan)
    seen = [units.square_norms(model).detach().sqrt()[span]]

    def look(step: int) -> None:
        seen.append(units.square_norms(model).detach().sqrt()[span])

    train(
        task, model, steps=steps, peak=task.recipe.sparse_rate, seed=0, start=0, attach=regularizer.attach,
        penalty=regularizer.penalty if method.mode == "loss" else None, after_step=look,
    )  # fmt: skip
    regularizer.detach()
    return torch.stack(seen).cpu()


def _budget(method: Method, task: Task) -> Budget | None:
    """The largest saving of the task, where the strength follows from it."""
    return Budget(speed_up=max(task.speed_ups)) if method.steered else None
