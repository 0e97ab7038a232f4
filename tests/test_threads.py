"""Tracing changes nothing of the process: threads get the plans that they get alone, and others train undisturbed."""

from __future__ import annotations

import gc
import random
import threading
import time
import warnings
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


@pytest.mark.slow
def test_thousands_of_checked_traces_equal_those_made_alone() -> None:
    alone = [traced(number, check=True) for number in range(len(CASES))]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: traced(number, check=True), range(2000)))
    assert found == [alone[number % len(CASES)] for number in range(2000)]


def test_checks_of_four_threads_find_what_they_find_alone() -> None:
    built = [(build(), x) for build, x in CASES]
    known = [(model, etp.trace(model, x, check=False), x) for model, x in built]
    alone = [etp.verify(model, plan, x) for model, plan, x in known]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda case: etp.verify(case[0], case[1], case[2]), known)) == alone


def test_no_number_of_a_global_generator_comes_twice_while_another_thread_traces() -> None:
    built = [(build(), x) for build, x in CASES]
    drawn, stop = list[tuple[float, ...]](), threading.Event()

    def draw() -> None:
        while not stop.is_set():
            drawn.append((*torch.rand(2, dtype=torch.float64).tolist(), np.random.rand(), random.random()))  # noqa: NPY002
            time.sleep(0.0002)

    thread = threading.Thread(target=draw)
    thread.start()
    for model, x in built:
        etp.verify(model, etp.trace(model, x), x)
    stop.set()
    thread.join()
    numbers = [number for each in drawn for number in each]
    assert len(drawn) > 100 and len(set(numbers)) == len(numbers)


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
        plans = [etp.trace(model, x, check=False).fingerprint for model, x in models * 3]
        assert beside.result() == alone
    assert plans == [traced(number) for number in range(len(CASES))] * 3


class Fails(Residual):
    def forward(self, x: Tensor) -> Tensor:
        torch.rand(2), np.random.rand(), random.random()  # noqa: NPY002
        super().forward(x)
        raise LookupError("in the middle")


def generators() -> list[Any]:
    return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]  # noqa: NPY002


def state(model: nn.Module) -> list[Any]:
    return [
        # Beside other threads (those of another test's progress bar) the generators keep what the forward drew.
        generators() if threading.active_count() == 1 else [],
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(), torch.is_inference_mode_enabled(), warnings.filters[:],
        torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled, torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"), torch.get_default_dtype(), gc.isenabled(),
        len(module_hooks._global_forward_hooks), len(module_hooks._global_forward_pre_hooks),
        [(type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [list(vars(m)) for m in model.modules()],
        [type(m.out_channels) for m in model.modules() if isinstance(m, nn.Conv2d)],
    ]  # fmt: skip


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", [Residual, Fails])
def test_everything_is_as_before_also_after_an_error(kind: type[Residual], autocast: bool) -> None:
    model = kind(4)
    model.a.register_forward_pre_hook(lambda *_: None)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), torch.inference_mode(autocast):
        leaves_everything_as_it_was(model, kind)


def leaves_everything_as_it_was(model: nn.Module, kind: type[Residual]) -> None:
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
