"""Tasks under other conditions: no training before the pruning, longer phases, or another optimizer.

The rates of the other optimizer are usual ones for such a network; nobody tuned them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.tasks.base import Task


def from_scratch(task: Task) -> Task:
    """The task without a checkpoint.

    The steps and the rate of the checkpoint belong to the sparse phase. Where the checkpoint is given, the sparse phase
    takes the steps of both phases, and nothing is fine-tuned: what counts is the network right after surgery.
    """
    own = task.recipe
    before, after = own.dense_steps + own.sparse_steps, own.finetune_steps
    if not own.dense_steps:
        before, after = own.sparse_steps + own.finetune_steps, 0
    task.recipe = replace(own, dense_steps=0, sparse_steps=before, finetune_steps=after, sparse_rate=own.dense_rate)
    task.start = task.build  # type: ignore[method-assign]
    task.title = f"{task.title}, from random weights"
    task.checkpoint_note = f"fresh weights, drawn with {'the seed of the run' if task.own_checkpoints else 'seed 0'}"
    return task


def twice_as_long(task: Task) -> Task:
    """The task with both phases twice as long, to see whether they are long enough."""
    own = task.recipe
    task.recipe = replace(own, sparse_steps=2 * own.sparse_steps, finetune_steps=2 * own.finetune_steps)
    task.title = f"{task.title}, phases of twice the length"
    return task


def trained_by(task: Task, optimizer: str, **rates: Any) -> Task:
    """The task with another optimizer, where the checkpoint is given: one trained so would be another."""
    assert not task.recipe.dense_steps
    task.recipe = replace(task.recipe, optimizer=optimizer, **rates)
    task.title = f"{task.title}, with {optimizer.upper().replace('ADAMW', 'AdamW')}"
    return task


CONDITIONS: dict[str, tuple[str, Callable[[Task], Task]]] = {
    "cifar10-scratch": ("cifar10", from_scratch),
    "ptb-scratch": ("ptb", from_scratch),
    "cora-scratch": ("cora", from_scratch),
    **{f"{name}-twice": (name, twice_as_long) for name in ("cifar10", "mrpc", "ptb", "cora")},
    "cifar10-adamw": ("cifar10", lambda task: trained_by(task, "adamw", sparse_rate=1e-3, finetune_rate=1e-3)),
}
"""Name -> the task, and what is done to it."""
