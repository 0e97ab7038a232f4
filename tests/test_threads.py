"""Tracing changes nothing of the process: threads get the plans that they get alone, and others train undisturbed."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

import etp_graph as etp


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head((x + self.norm(self.b(x))).relu().mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, width, num_layers=2, batch_first=True), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def encoder(width: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True)
    return nn.Sequential(nn.Linear(5, width), nn.TransformerEncoder(layer, 2), nn.Linear(width, 3)).eval()


CASES: list[tuple[Callable[[], nn.Module], Tensor]] = [
    *((lambda w=w: Residual(w), torch.randn(1, 3, 6, 6)) for w in (4, 6, 8)),
    *((lambda w=w: Recurrent(w), torch.randn(1, 4, 5)) for w in (4, 6)),
    *((lambda w=w: encoder(w), torch.randn(1, 4, 5)) for w in (8, 12, 16)),
]


def traced(number: int, check: bool = False) -> str:
    build, x = CASES[number % len(CASES)]
    return etp.trace(build(), x, check=check).fingerprint


def test_traces_of_four_threads_equal_those_made_alone() -> None:
    alone = [traced(number) for number in range(len(CASES))]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(traced, range(200)))
    assert found == [alone[number % len(CASES)] for number in range(200)]


def training(steps: int) -> list[float]:
    """Losses of a training whose dropout draws from the global generator."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y, losses = torch.ones(4, 8), torch.zeros(4, 2), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_a_training_beside_traces_is_as_it_is_alone() -> None:
    models = [(build(), x) for build, x in CASES]  # their initial weights draw from the global generator
    alone = training(400)
    with ThreadPoolExecutor(2) as pool:
        beside = pool.submit(training, 400)
        plans = [etp.trace(model, x, check=False).fingerprint for model, x in models * 4]
        assert beside.result() == alone
    assert plans == [traced(number) for number in range(len(CASES))] * 4


class Fails(Residual):
    def forward(self, x: Tensor) -> Tensor:
        torch.rand(2), np.random.rand(), random.random()  # noqa: NPY002
        super().forward(x)
        raise LookupError("in the middle")


def state(model: nn.Module) -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        # Beside other threads these two are left alone, because it is not known which thread drew.
        *((str(np.random.get_state()), random.getstate()) if threading.active_count() == 1 else ()),  # noqa: NPY002
        torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled, torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"), torch.get_default_dtype(), gc.isenabled(),
        len(module_hooks._global_forward_hooks), len(module_hooks._global_forward_pre_hooks),
        [(type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [list(vars(m)) for m in model.modules()],
        [type(m.out_channels) for m in model.modules() if isinstance(m, nn.Conv2d)],
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [Residual, Fails])
def test_everything_is_as_before_also_after_an_error(kind: type[Residual]) -> None:
    model = kind(4)
    before = state(model)
    try:
        etp.trace(model, torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)), check=False)
    except LookupError:
        assert kind is Fails
    assert state(model) == before


def test_the_plan_under_autocast_is_that_without() -> None:
    model, x = encoder(8), torch.randn(1, 4, 5)
    expected = etp.trace(model, x).fingerprint
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert etp.trace(model, x).fingerprint == expected
