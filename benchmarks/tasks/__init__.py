"""The tasks of the comparison, by name: a model, real data, a training recipe and a metric each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.tasks.base import Metric, Part, Recipe, Scale, Task, TaskUnavailableError
from benchmarks.tasks.cifar10 import Pretrained, Untrained, Vgg19
from benchmarks.tasks.cifar100 import Cifar100
from benchmarks.tasks.ett import Ett
from benchmarks.tasks.flickr8k import Flickr8k
from benchmarks.tasks.glue import Glue
from benchmarks.tasks.graphs import PPI, Cora, Tolokers
from benchmarks.tasks.other_conditions import CONDITIONS
from benchmarks.tasks.ptb import Ptb
from etp_graph.demo.zoo.models import DenseNet, PreactResNet

__all__ = ["CONDITIONS", "SCALES", "TASKS", "Metric", "Part", "Recipe", "Scale", "Task", "TaskUnavailableError", "make"]

TASKS: dict[str, Callable[[Scale], Task]] = {
    "cifar10": partial(Pretrained, depth=20),
    "cifar10-resnet56": partial(Pretrained, depth=56),
    "cifar10-densenet40": partial(Untrained, kind=DenseNet),
    "cifar10-resnet164": partial(Untrained, kind=PreactResNet),
    "cifar10-vgg19": Vgg19,
    "cifar100": Cifar100,
    "sst2": partial(Glue, name="sst2"),
    "mrpc": partial(Glue, name="mrpc"),
    "ppi": PPI,
    "tolokers": Tolokers,
    "cora": Cora,
    "ett": Ett,
    "flickr8k": Flickr8k,
    "ptb": Ptb,
}
SCALES: tuple[Scale, ...] = ("cpu", "full", "paper", "smoke")
"""``cpu``: minutes for a run on one core. ``full``: all data at hand, up to hours of a core. ``paper``: the sizes of
the papers, for a GPU. ``smoke``: a test."""


def make(name: str, scale: Scale) -> Task:
    """The task, also one of :data:`CONDITIONS`.

    Raises:
        TaskUnavailableError: its data, weights or libraries are missing.
    """
    base, change = CONDITIONS.get(name, (name, lambda task: task))
    task = change(TASKS[base](scale))
    task.place()
    return task
