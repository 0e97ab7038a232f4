"""A run that continues has all that ``train`` changed in the model: buffers, flags, attributes, memory formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.compression._journal import JOURNAL_FILE

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.mix = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)
        self.register_buffer("scale", torch.ones(4), persistent=False)
        self.slope, self.window, self.mode = 0.1, (3, 3), "plain"

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.leaky_relu(self.mix(self.drop(self.conv(x).relu())), self.slope).mean((2, 3))
        return self.head(x) * self.scale * (2 if self.mode == "wide" else 1)


def build() -> Net:
    torch.manual_seed(0)
    return Net()


class Stopped(Exception):
    """The machine dies."""


class Training:
    """Changes everything that a training loop may change besides weights, and stops at one of its calls."""

    def __init__(self, stop_at: int = -1, *, swap: bool = False) -> None:
        self.stop_at, self.swap, self.calls = stop_at, swap, 0

    def _call(self) -> None:
        self.calls += 1
        if self.calls - 1 == self.stop_at:
            raise Stopped

    def train(self, model: Any, phase: etp.Phase) -> None:
        self._call()
        if phase.name == "sparse":
            model.drop.p, model.slope, model.window, model.mode, model.epochs = 0.25, 0.3, (5, 5), "wide", 2
            model.to(memory_format=torch.channels_last)
        else:
            model.head.bias.requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        phase.attach(optimizer, steps=3)
        for _ in range(3):
            nn.functional.cross_entropy(model(X), Y).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.scale.mul_(1.25)
        if self.swap:
            model.drop = nn.Identity()

    def evaluate(self, model: nn.Module) -> float:
        self._call()
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(X), Y))


def run(model: nn.Module, training: Training, folder: Path | None) -> None:
    torch.manual_seed(1)
    etp.compress(
        model, X[:1], train=training.train, evaluate=training.evaluate, speed_up=1.5, rounds=2, checkpoint=folder,
        progress=False, check=False,
    )  # fmt: skip


def facts(model: Net) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: (tensor.detach().tolist(), tensor.stride(), tensor.requires_grad)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    return found | {"drop": model.drop.p} | {n: v for n, v in vars(model).items() if not n.startswith("_")}


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[dict[str, Any], int]:
    model, training = build(), Training()
    run(model, training, None)
    return facts(model), training.calls


@pytest.mark.parametrize("stop_at", [2, 4, 7, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 20))])
def test_a_run_continues_with_all_that_train_changed(
    stop_at: int, uninterrupted: tuple[dict[str, Any], int], tmp_path: Path
) -> None:
    expected, calls = uninterrupted
    assert expected["drop"] == 0.25 and expected["slope"] == 0.3 and expected["epochs"] == 2
    assert not expected["head.bias"][2] and expected["scale"][0] != [1.0] * 4
    if stop_at >= calls:
        pytest.skip("the run is over")
    with pytest.raises(Stopped):
        run(build(), Training(stop_at), tmp_path / "run")
    model = build()
    run(model, Training(), tmp_path / "run")
    assert facts(model) == expected


def test_a_module_that_train_replaced_cannot_be_restored(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(build(), Training(2, swap=True), tmp_path / "run")
    model = build()
    before = facts(model)
    with pytest.raises(etp.CheckpointError, match="replaced 'drop'"):
        run(model, Training(), tmp_path / "run")
    assert facts(model) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["attributes"].update({"drop": {"forward": "x"}}),
        lambda s: s["attributes"].update({"drop": {"_modules": 1}}),
        lambda s: s["attributes"].update({"nobody": {"p": 1}}),
        lambda s: s["attributes"].update({"drop": {"p": {"a": 1}}}),
        lambda s: s["attributes"].update({"drop": 3}),
        lambda s: s["trainable"].update({"conv.weight": 3}),
        lambda s: s["trainable"].update({"nobody": True}),
        lambda s: s["orders"].update({"conv.weight": [0, 1, 2, 2]}),
        lambda s: s["orders"].update({"conv.weight": [0, 1, 2**40, 2]}),
        lambda s: s.pop("orders"),
        lambda s: s.update(replaced=3),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_refused(change: Any, tmp_path: Path) -> None:
    from etp_graph.compression._training_state import TrainingState, restore_training_state_

    model = build()
    start = TrainingState(model)
    model.drop.p = 0.1
    state, buffers = start.describe(model)
    state = json.loads(json.dumps(state))
    restore_training_state_(build(), state, buffers)
    change(state)
    other = build()
    before = facts(other)
    with pytest.raises(etp.CheckpointError):
        restore_training_state_(other, state, buffers)
    assert facts(other) == before


def test_a_run_without_such_a_state_continues(tmp_path: Path) -> None:
    """Version 0.1.0 wrote none."""
    with pytest.raises(Stopped):
        run(build(), Training(3), tmp_path / "run")
    file = tmp_path / "run" / JOURNAL_FILE
    body = json.loads(file.read_text())
    assert any("training_state" in step for step in body["steps"])
    from etp_graph.compression._training_state import restore_training_state_

    restore_training_state_(build(), None, {})
