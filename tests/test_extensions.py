"""A criterion, a force, a schedule and a method of a user work from his own module, as built-in ones do."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import etp_graph as etp
from etp_graph import criteria, forces, methods, schedules
from etp_graph.errors import EtpError
from etp_graph.report import write_report

SOURCE = """
from dataclasses import dataclass

import torch
from etp_graph import criteria, forces, methods, schedules


@criteria.register_criterion()
def first_units(model, plan):
    return torch.cat([torch.arange(group.n_units, 0, -1.0) for group in plan.groups])


@forces.register
@dataclass(frozen=True, slots=True, kw_only=True)
class Power(forces.Force):
    exponent: float = 2.0

    def __call__(self, distance, *, size=None, importance=None):
        return distance**self.exponent


@schedules.register
@dataclass(frozen=True, slots=True, kw_only=True)
class Root(schedules.Schedule):
    def at(self, progress):
        return progress**0.5


MINE = methods.register(methods.Method(name="mine", force=Power(), beta=1e-3, strength=Root(), criterion=first_units))


def unregistered(model, plan):
    return first_units(model, plan) * 2
"""


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    folder = tmp_path_factory.mktemp("user")
    (folder / "users_extension.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("users_extension")
    sys.path.remove(str(folder))


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def compress(method: Any, folder: Path | None) -> tuple[etp.CompressResult, nn.Module, int]:
    x, y = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(16, 2)
    phases = 0

    def train(model: nn.Module, phase: etp.Phase) -> None:
        nonlocal phases
        phases += 1
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        phase.attach(optimizer, steps=3)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()

    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            return float(nn.functional.mse_loss(model(x), y))

    model = build()
    result = etp.compress(
        model, x[:1], train=train, evaluate=evaluate, speed_up=2, method=method, checkpoint=folder
    )  # fmt: skip
    return result, model, phases


def test_all_of_it_from_a_file_outside_the_package(user: ModuleType, tmp_path: Path) -> None:
    result, model, phases = compress("mine", tmp_path / "run")
    assert phases == 2
    (selection,) = result.selections
    assert selection.keep["0"].tolist() == [True] * 4 + [False] * 4  # the criterion keeps the first units
    assert etp.CompressResult.from_json(result.to_json()).to_json() == result.to_json()
    again, other, phases = compress("mine", tmp_path / "run")
    assert (again.to_json(), phases) == (result.to_json(), 0)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    etp.save(model, tmp_path / "model")
    loaded = etp.load(tmp_path / "model", build=build)
    assert torch.equal(loaded(torch.ones(1, 4)), model(torch.ones(1, 4)))
    assert "mine" in write_report(tmp_path / "run", tmp_path / "run.html").read_text()


def test_each_goes_to_json_and_back(user: ModuleType) -> None:
    assert forces.from_json(user.Power(exponent=3.0).to_json()) == user.Power(exponent=3.0)
    assert schedules.from_json(user.Root().to_json()) == user.Root()
    assert methods.Method.from_json(user.MINE.to_json()) == user.MINE
    assert methods.get("mine") is user.MINE
    assert any(score is user.first_units for score in criteria.CRITERIA.values())


def test_a_function_that_is_not_registered_works_without_a_folder(user: ModuleType, tmp_path: Path) -> None:
    method = methods.Method(name="its own", criterion=user.unregistered)
    _, model, _ = compress(method, None)
    assert model[0].out_features == 4
    with pytest.raises(EtpError, match="not registered"):
        method.to_json()
    with pytest.raises(EtpError, match="not registered"):
        compress(method, tmp_path / "run")


def test_reading_json_imports_no_module(user: ModuleType) -> None:
    text = user.Power().to_json().replace("users_extension", "antigravity_of_a_user")
    with pytest.raises(EtpError, match="antigravity_of_a_user"):
        forces.from_json(text)
    assert "antigravity_of_a_user" not in sys.modules
