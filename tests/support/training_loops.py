"""Training loops that remember how they were called, for the tests of the whole pipeline."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etp_graph.compression import CompressResult, Phase, compress
from etp_graph.demo.zoo.data import digits
from tests.support.models.toy import Toy

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 5
STEPS = 3


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def loss(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


class Loop:
    """A training loop that remembers how it was called; its batches come from the global generator."""

    def __init__(self, x: Tensor = X, y: Tensor = Y) -> None:
        self.x, self.y = x, y
        self.phases: list[Phase] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.metrics: list[float] = []

    def train(self, model: nn.Module, phase: Phase) -> None:
        watched = phase.name == "calibrate" and phase.method.criterion != "taylor"
        assert all(module.training != watched for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        regularizer = phase.attach(optimizer, steps=STEPS)
        assert (regularizer is None) == (phase.name != "sparse" or phase.method.force is None)
        for step in range(STEPS):
            chosen = torch.randperm(len(self.x))[:8]
            phase.labels(self.y[chosen])
            value = loss(model, self.x[chosen], self.y[chosen]) + phase.penalty()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            phase.report(step + 1, STEPS)
        self.phases.append(phase)
        self.optimizers.append(optimizer)

    def evaluate(self, model: nn.Module) -> float:
        assert not any(module.training for module in model.modules())
        with torch.no_grad():
            self.metrics.append(float(loss(model, self.x, self.y)))
        return self.metrics[-1]


def run(model: nn.Module, loop: Loop | None = None, **arguments: object) -> CompressResult:
    loop = loop or Loop()
    arguments = {"speed_up": 2, **arguments} if not {"macs", "params", "budget"} & arguments.keys() else arguments
    torch.manual_seed(1)
    return compress(model, loop.x[:1], **{"train": loop.train, "evaluate": loop.evaluate, **arguments})  # type: ignore


def images() -> Loop:
    """A loop on a few real scans of every digit."""
    split = digits(seed=0)
    mixed = torch.randperm(len(split.train_y), generator=torch.Generator().manual_seed(0))[:64]
    return Loop(split.train_x[mixed], split.train_y[mixed])
