"""A training loop that draws from every global generator and fails in one of its calls."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from torch import nn

from etp_graph import schedules
from etp_graph.compression import CompressResult, Phase, compress
from tests.support.models.toy import Toy

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 5
ROUNDS = schedules.iterative(2)


class Power(Exception):
    """The machine dies."""


class Loop:
    """Training and evaluation that draw from every global generator, and fail in one of their calls."""

    def __init__(self, fail_at: int | None = None, *, late: bool = False) -> None:
        self.fail_at, self.late = fail_at, late
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if not self.late:
            self._fail()

    def _fail(self) -> None:
        if self.fail_at == len(self.calls) - 1:
            raise Power

    def train(self, model: nn.Module, phase: Phase) -> None:
        self._call(f"{phase.name} {phase.round}")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        phase.attach(optimizer, steps=3)
        for _ in range(3):
            chosen = torch.randperm(16)[: random.randint(4, 12)]
            noise = float(np.random.normal())  # noqa: NPY002
            phase.labels(Y[chosen])
            value = nn.functional.cross_entropy(model(X[chosen] + noise), Y[chosen]) + phase.penalty()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
        self._fail()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        self._call("evaluate")
        chosen = torch.randperm(16)[:12]  # a sloppy evaluation moves the generator, too
        metric = float(nn.functional.cross_entropy(model(X[chosen]), Y[chosen]))
        self._fail()
        return metric


def seed() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def run(model: nn.Module, loop: Loop, folder: Path | None, **arguments: object) -> CompressResult:
    arguments = {"speed_up": 2.5, "schedule": ROUNDS, **arguments}
    return compress(model, X[:1], train=loop.train, evaluate=loop.evaluate, checkpoint=folder, **arguments)  # type: ignore


def facts(result: CompressResult) -> dict[str, object]:
    """Everything in a result but the seconds."""
    body = json.loads(result.to_json())
    del body["seconds_dense"]
    for one in body["rounds"]:
        del one["seconds"]
    return body
