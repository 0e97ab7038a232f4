"""A criterion, a force, a schedule and a method of a user work from his own module, as built-in ones do."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
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
from etp_graph.collect import Statistic


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


class Peaks(Statistic):
    peak = None

    def update(self, values, labels):
        peak = values.abs().amax((0, 2)).double()
        self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
        self.samples += len(values)

    def result(self):
        return self.site.average(self.peak)


@criteria.register_criterion("peaks", observes=Peaks)
def peaks(model, plan, *, record=None, normalize="mean"):
    assert normalize == "sum"
    return record.read("peaks", plan)


@criteria.register_criterion("effects", observes="gradients")
def effects(model, plan, *, observations=None):
    return observations.read("effects", plan)


def unregistered(model, plan):
    return first_units(model, plan) * 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Shy(forces.Exponential):
    pass
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The user's module, imported anew: what it registers is gone after the test."""
    (tmp_path / "users_extension.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_extension", raising=False)
    module = importlib.import_module("users_extension")
    monkeypatch.setitem(sys.modules, "users_extension", module)  # so that it is removed after the test
    return module


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def compress(method: Any, folder: Path | None) -> tuple[etp.CompressResult, nn.Sequential, int]:
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
    result = etp.compress(model, x[:1], train=train, evaluate=evaluate, speed_up=2, method=method, checkpoint=folder)
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


def test_a_function_equals_its_name(user: ModuleType) -> None:
    """A criterion with a name of its own is that name in a method; one without is the function itself."""
    assert methods.Method(name="x", criterion=user.peaks) == methods.Method(name="x", criterion="peaks")
    assert methods.Method(name="x", criterion=criteria.lamp).criterion == "lamp"
    path = "users_extension:first_units"
    assert methods.Method(name="x", criterion=path).criterion is user.first_units
    assert json.loads(user.MINE.to_json())["criterion"] == path


def test_a_function_that_is_registered_later_goes_to_json_and_back(user: ModuleType) -> None:
    method = methods.Method(name="its own", criterion=user.unregistered)
    criteria.register(user.unregistered)
    assert methods.Method.from_json(method.to_json()) == method


@pytest.mark.parametrize("name", ["peaks", "effects"])
def test_data_are_recorded_for_a_criterion_of_a_user(user: ModuleType, tmp_path: Path, name: str) -> None:
    method = methods.Method(name="mine from data", criterion=name, normalize="sum")
    result, _, phases = compress(method, tmp_path / "run")
    assert phases == 2  # calibrate, finetune
    assert name in criteria.COLLECTED
    selected = replace(method, criterion=getattr(user, name))
    assert selected == method
    again, _, phases = compress(method, tmp_path / "run")
    assert (again.to_json(), phases) == (result.to_json(), 0)


def test_a_statistic_of_a_user_is_that_of_the_activations(user: ModuleType) -> None:
    model, x = build(), torch.randn(16, 4)
    plan = etp.trace(model, x[:1])
    with etp.collect.activations(model, plan, "peaks") as record:
        model(x)
        model(2 * x)
    expected = torch.relu(model[0](2 * x)).maximum(torch.relu(model[0](x))).amax(0)
    torch.testing.assert_close(record.read("peaks", plan)[:8].float(), expected)
    with etp.collect.watch(model, plan, "effects") as record:
        model(x).sum().backward()
    torch.testing.assert_close(record.read("effects", plan)[:8].float(), criteria.taylor(model, plan)[:8])


@pytest.mark.parametrize("values", [
    {"soft_every": 1}, {"force": forces.ridge(), "mode": "gradient", "acts_on": "losers"},
])  # fmt: skip
def test_losers_are_chosen_by_a_function(user: ModuleType, values: dict[str, Any]) -> None:
    result, model, _ = compress(methods.Method(name="x", criterion=user.unregistered, **values), None)
    assert result.selections[0].keep["0"].tolist() == [True] * 4 + [False] * 4
    assert model[0].out_features == 4


def test_a_function_that_is_not_registered_works_without_a_folder(user: ModuleType, tmp_path: Path) -> None:
    method = methods.Method(name="its own", criterion=user.unregistered)
    _, model, _ = compress(method, None)
    assert model[0].out_features == 4
    with pytest.raises(etp.ScoreError, match=r"not registered.*criteria\.register\(unregistered\)"):
        method.to_json()
    with pytest.raises(EtpError, match="not registered"):
        compress(method, tmp_path / "run")


def test_a_force_that_is_not_registered_trains_and_keeps_its_state(user: ModuleType, tmp_path: Path) -> None:
    model, x = build(), torch.randn(4, 4)
    plan, force = etp.trace(model, x[:1]), user.Shy(rate=2.0)
    regularizer = etp.Regularizer(model, plan, force=force)
    etp.Regularizer(model, plan, force=force).load_state_dict(regularizer.state_dict())
    with pytest.raises(etp.ForceError, match="other settings"):  # Shy is not taken for the exponential it derives from
        etp.Regularizer(model, plan, force=forces.Exponential(rate=2.0)).load_state_dict(regularizer.state_dict())
    remedy = r"not registered.*forces\.register\(Shy\)"
    for write in (force.to_json, regularizer.settings.to_json, methods.Method(name="x", force=force).to_json):
        with pytest.raises(etp.ForceError, match=remedy):
            write()
    with pytest.raises(etp.SettingError, match=remedy):
        compress(methods.Method(name="x", force=force), tmp_path / "run")
    forces.register(user.Shy)
    assert forces.from_json(force.to_json()) == force


def test_a_process_without_the_module_is_told_to_import_it(user: ModuleType, tmp_path: Path) -> None:
    result, _, _ = compress("mine", tmp_path / "run")
    (tmp_path / "result.json").write_text(result.to_json())
    script = """
import sys
import etp_graph as etp
from etp_graph.report import write_report
for read in (
    lambda: etp.CompressResult.from_json(open("result.json").read()), lambda: write_report("run", "run.html")
):
    try:
        read()
    except etp.EtpError as error:
        assert "users_extension" in str(error) and "mport" in str(error), error
        assert "copy" not in str(error), error
    else:
        raise AssertionError
assert "users_extension" not in sys.modules
import users_extension
assert etp.CompressResult.from_json(open("result.json").read()).method == users_extension.MINE
write_report("run", "run.html")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_reading_json_imports_no_module(user: ModuleType) -> None:
    text = user.Power().to_json().replace("users_extension", "antigravity_of_a_user")
    with pytest.raises(EtpError, match="antigravity_of_a_user"):
        forces.from_json(text)
    assert "antigravity_of_a_user" not in sys.modules
