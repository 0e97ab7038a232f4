"""What the tasks on 32 x 32 photos share: a pool of images, random crops and mirror images, accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tasks.base import Metric, Part, Task
from etp_graph.demo.zoo.data import Split
from etp_graph.demo.zoo.training import accuracy, crop_flip


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Images for training, for choosing and for the final figure; each is a class-balanced prefix."""

    train: int
    val: int
    test: int


class PhotoTask(Task):
    """Classification of photos; subclasses set ``split``."""

    metric = Metric(name="accuracy", percent=True)
    split: Split
    latency_batch = 16

    @property
    def n_train(self) -> int:
        return len(self.split.train_x)

    def example(self) -> Tensor:
        return self.split.train_x[:1]

    def latency_inputs(self) -> Tensor:
        return self.split.train_x[: self.latency_batch]

    def inputs(self, chosen: Tensor) -> Tensor:
        return self.split.train_x[chosen]

    def loss(self, model: nn.Module, chosen: Tensor, generator: torch.Generator) -> Tensor:
        x = crop_flip(self.split.train_x[chosen], generator).contiguous(memory_format=torch.channels_last)
        return F.cross_entropy(model(x), self.split.train_y[chosen])

    def labels(self, chosen: Tensor) -> Tensor:
        return self.split.train_y[chosen]

    def evaluate(self, model: nn.Module, part: Part) -> float:
        if part == "val":
            return accuracy(model, self.split.val_x, self.split.val_y)
        return accuracy(model, self.split.test_x, self.split.test_y)
