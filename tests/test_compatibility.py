"""What version 0.1.0 wrote (``tests/data/0.1.0``) loads today and computes what it computed then."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import etp_graph as etp
from etp_graph import methods

DATA = Path(__file__).parent / "data" / "0.1.0"


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def cnn() -> nn.Module:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    layers = (first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(8, 4)).eval()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.0)
    return nn.Sequential(nn.Linear(5, 16), layer, nn.Linear(16, 2)).eval()


BUILD: dict[str, Callable[[], nn.Module]] = {"cnn": cnn, "lstm": Lstm, "encoder": encoder}


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(DATA / "tensors.safetensors")


@pytest.mark.parametrize("name", BUILD)
def test_checkpoints_load(name: str, tensors: dict[str, Tensor]) -> None:
    model = etp.load(DATA / name, build=BUILD[name]).eval()
    torch.testing.assert_close(model(tensors[f"{name}.input"]), tensors[f"{name}.output"])


@pytest.mark.parametrize("name", BUILD)
def test_plans_and_selections_are_read_and_equal_those_of_today(name: str, tensors: dict[str, Tensor]) -> None:
    model, x = BUILD[name]().eval(), tensors[f"{name}.input"]
    old = etp.Plan.from_json((DATA / f"{name}.plan.json").read_text())
    now = etp.trace(model, x)
    assert (old.fingerprint, old.to_json()) == (now.fingerprint, now.to_json())
    selection = etp.Selection.from_json((DATA / f"{name}.selection.json").read_text())
    etp.prune_(model, now, selection)
    assert {n: t.shape for n, t in model.state_dict().items()} == {
        n: t.shape for n, t in etp.load(DATA / name, build=BUILD[name]).state_dict().items()
    }


def test_configurations_are_read() -> None:
    assert etp.Budget.from_json((DATA / "budget.json").read_text()) == etp.Budget(
        speed_up=2.5, min_units=2, scope="local"
    )
    was_global = replace(
        methods.get("etp"), scope="global", source=methods.Method.from_json((DATA / "method.json").read_text()).source
    )
    for file, method in (("method.json", was_global), ("greg2.json", methods.get("greg2"))):
        assert methods.Method.from_json((DATA / file).read_text()) == method
    result = etp.CompressResult.from_json((DATA / "result.json").read_text())
    assert len(result.rounds) == 2
    assert etp.CompressResult.from_json(result.to_json()).to_json() == result.to_json()


def compress(
    folder: Path, method: str | methods.Method = "etp", rounds: int = 2
) -> tuple[etp.CompressResult, nn.Module, list[str]]:
    y = torch.randint(4, (16,), generator=torch.Generator().manual_seed(2))
    x = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(3))
    ran: list[str] = []

    def train(model: nn.Module, phase: etp.Phase) -> None:
        ran.append(phase.name)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        phase.attach(optimizer, steps=4)
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    def evaluate(model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(x), y))

    model = cnn()
    torch.manual_seed(5)
    inputs = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))[:1]
    found = etp.compress(
        model, inputs, train=train, evaluate=evaluate, speed_up=2, method=method, rounds=rounds, checkpoint=folder
    )
    return found, model.eval(), ran


def test_a_finished_run_is_read_without_training(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    shutil.copytree(DATA / "finished", tmp_path / "run")
    with pytest.warns(UserWarning, match="scope is 'global', today 'local'"):
        result, model, ran = compress(tmp_path / "run")
    assert not ran
    assert result.to_json() == (DATA / "result.json").read_text()
    torch.testing.assert_close(model(tensors["cnn.input"]), tensors["finished.output"])


@pytest.mark.parametrize("folder", ["finished", "interrupted"])
def test_a_run_keeps_the_settings_of_its_method_and_refuses_another_one(tmp_path: Path, folder: str) -> None:
    shutil.copytree(DATA / folder, tmp_path / "run")
    with pytest.raises(etp.CheckpointError, match=r"method\.name was"):
        compress(tmp_path / "run", method="l1-gradual")
    with pytest.warns(UserWarning, match="of a former version and goes on"):
        result, _, _ = compress(tmp_path / "run")
    assert result.method.scope == "global"


def test_a_method_of_ones_own_is_never_taken_for_a_former_preset(tmp_path: Path) -> None:
    mine = replace(methods.get("etp"), beta=0.01, acts_on="units", scope="global")  # it keeps the name
    compress(tmp_path / "run", method=mine)
    with pytest.raises(etp.CheckpointError, match=r"method\.beta was"):
        compress(tmp_path / "run")


def test_a_run_of_a_former_preset_with_other_rounds_is_refused_without_a_warning(tmp_path: Path) -> None:
    shutil.copytree(DATA / "finished", tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(etp.CheckpointError, match=r"method\.rounds was 2, is 3"):
            compress(tmp_path / "run", rounds=3)


def test_an_interrupted_run_goes_on(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    shutil.copytree(DATA / "interrupted", tmp_path / "run")
    with pytest.warns(UserWarning, match="of a former version and goes on"):
        _, model, ran = compress(tmp_path / "run")
    assert ran == ["sparse", "finetune"]
    torch.testing.assert_close(model(tensors["cnn.input"]), tensors["finished.output"], rtol=1e-3, atol=1e-3)


def test_reports_are_written(tmp_path: Path) -> None:
    from etp_graph.report import write_report

    for folder in ("finished", "interrupted", "cnn"):
        assert write_report(DATA / folder, tmp_path / f"{folder}.html").exists()


def test_a_pruned_model_that_was_pickled_whole(tensors: dict[str, Tensor]) -> None:
    model = torch.load(DATA / "encoder.pickle.pt", weights_only=False)
    torch.testing.assert_close(model(tensors["encoder.input"]), tensors["encoder.output"])


def test_the_old_path_of_plan_from_depgraph_warns() -> None:
    sys.modules.pop("etp_graph.depgraph", None)
    with pytest.warns(DeprecationWarning, match=r"etp_graph\.integrations\.torch_pruning"):
        old = importlib.import_module("etp_graph.depgraph")
    from etp_graph.integrations.torch_pruning import plan_from_depgraph

    assert old.plan_from_depgraph is plan_from_depgraph


def test_the_package_shows_its_public_names_only() -> None:
    """In a process of its own, because other tests import further packages."""
    code = "import etp_graph as e; print(sorted(set(dir(e)) - set(e.__all__)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['__version__']"


@pytest.mark.parametrize("name", etp.__all__)
def test_no_module_is_named_like_a_public_function(name: str) -> None:
    if callable(getattr(etp, name)):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"etp_graph.{name}")
