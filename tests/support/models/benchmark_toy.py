"""A small task for the tests of the comparison: noise in eight classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tasks import Metric, Recipe, Task
from benchmarks.tasks.base import Part

RECIPE = Recipe(
    dense_steps=3, sparse_steps=4, finetune_steps=4, scratch_steps=3, dense_rate=0.05, sparse_rate=0.02,
    finetune_rate=0.02, batch_size=8, tune_share=0.5, pushes=(0.5, 2.0),
)  # fmt: skip


class Toy(Task):
    """Knows which parts were read, and which examples were trained on."""

    name, title = "toy", "a toy"
    metric = Metric(name="accuracy", percent=True)
    recipe = RECIPE
    speed_ups = (2.0,)

    def __init__(self) -> None:
        super().__init__("smoke")
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(40, 3, 8, 8, generator=generator)
        self.y = torch.randint(8, (40,), generator=generator)
        self.read: list[str] = []
        self.seen: list[list[int]] = []

    @property
    def n_train(self) -> int:
        return len(self.x)

    def build(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8),
        )  # fmt: skip

    def example(self) -> Tensor:
        return self.x[:1]

    def inputs(self, chosen: Tensor) -> Tensor:
        return self.x[chosen]

    def loss(self, model: nn.Module, chosen: Tensor, generator: torch.Generator) -> Tensor:
        self.seen.append(chosen.tolist())
        return F.cross_entropy(model(self.x[chosen]), self.y[chosen])

    def evaluate(self, model: nn.Module, part: Part) -> float:
        self.read.append(part)
        with torch.no_grad():
            return float((model.eval()(self.x).argmax(1) == self.y).float().mean())


def fields_of(recipe: Recipe) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in Recipe.__dataclass_fields__}
