"""Modules inside a pruned model: saved, loaded and pruned again without the model around them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.surgery import SurgeryRecord, get_record

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        self.mix = nn.Conv2d(16, 24, 3, groups=8)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.stem(x)
        return self.head(self.mix(h).relu().mean((2, 3))), h


class OnlyLogits(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"net": inner})

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner["net"](x)[0]
        return logits


def _prune(model: nn.Module) -> None:
    plan = etp.trace(model, X)
    etp.prune_(
        model, plan, etp.allocate(model, plan, etp.criteria.magnitude(model, plan), budget=etp.Budget(speed_up=2))
    )


def _pruned() -> tuple[OnlyLogits, Inner]:
    torch.manual_seed(0)
    inner = Inner().eval()
    model = OnlyLogits(inner)
    _prune(model)
    return model, inner


@pytest.mark.parametrize("path", ["inner.net", "inner.net.stem", "inner.net.mix"])
def test_a_part_of_a_pruned_model_is_saved_and_loaded_alone(path: str, tmp_path: Path) -> None:
    model, _ = _pruned()
    part = model.get_submodule(path)
    loaded = etp.load(etp.save(part, tmp_path / "part"), build=lambda: OnlyLogits(Inner()).get_submodule(path)).eval()
    x = torch.randn(2, 16, 6, 6) if path.endswith("mix") else X
    if path.endswith("mix"):
        x = x[:, : part.in_channels]  # type: ignore[operator]
        assert loaded.groups == part.groups < 8
    for got, want in zip(tuple(loaded(x)), tuple(part(x)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "choose",
    [
        lambda inner: nn.Sequential(*list(inner.children())[:2]),
        lambda inner: inner.stem[:2],
        lambda inner: nn.ModuleDict({"body": nn.Sequential(inner.stem, inner.mix), "other": nn.Linear(2, 2)})["body"],
    ],
)
def test_a_new_container_of_parts_is_saved_and_loaded(choose: Callable[[Any], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(1)
    _, inner = _pruned()
    container = choose(inner)
    loaded = etp.load(etp.save(container, tmp_path / "parts"), build=lambda: choose(Inner())).eval()
    assert torch.equal(loaded(X), container(X))
    with pytest.raises(etp.CheckpointError, match="pruned before"):
        etp.load(tmp_path / "parts", build=container)


def test_a_part_is_pruned_again_and_keeps_both_rounds(tmp_path: Path) -> None:
    model, inner = _pruned()
    alone = copy.deepcopy(inner)
    wrapped = OnlyLogits(alone)
    plan = etp.trace(alone, X, outputs="0")
    keep = {group.name: torch.arange(group.n_units) > 0 for group in plan.prunable}
    etp.prune_(alone, plan, etp.Selection(keep))
    assert len(get_record(alone).fingerprints) == 2
    loaded = etp.load(etp.save(alone, tmp_path / "again"), build=Inner).eval()
    assert torch.equal(loaded(X)[0], alone(X)[0])
    with pytest.raises(etp.CheckpointError, match="pruned on its own"):
        etp.save(wrapped, tmp_path / "wrapped")
    etp.save(model, tmp_path / "model")  # the copy is another module


def test_a_pruned_part_is_no_original_architecture(tmp_path: Path) -> None:
    _, inner = _pruned()
    folder = etp.save(inner, tmp_path / "part")
    with pytest.raises(etp.CheckpointError, match="pruned before"):
        etp.load(folder, build=inner)


def test_modules_that_lost_nothing_have_no_record() -> None:
    _, inner = _pruned()
    named = {name for name, module in inner.named_modules() if get_record(module) != SurgeryRecord()}
    assert named == {"", "stem", "stem.0", "stem.1", "mix", "head"}
    assert get_record(inner.stem[2]) == SurgeryRecord()


def test_surgery_that_fails_leaves_the_records_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inner = _pruned()
    before = {name: get_record(module) for name, module in model.named_modules()}
    plan = etp.trace(model, X)
    keep = {group.name: torch.arange(group.n_units) > 0 for group in plan.prunable}
    calls = iter([True])

    def fail(*_: object) -> None:
        if next(calls, False):
            raise KeyboardInterrupt

    monkeypatch.setattr("etp_graph.surgery._record.size_caches_by_keys_", fail)
    with pytest.raises(KeyboardInterrupt):
        etp.prune_(model, plan, etp.Selection(keep))
    assert {name: get_record(module) for name, module in model.named_modules()} == before
    assert all(torch.equal(a, b) for a, b in zip(inner(X), model.inner["net"](X), strict=True))
