"""The sweep over models that the libraries list: one line for each, whatever happens to its process."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from benchmarks.coverage import measure as measure_module
from benchmarks.coverage import sources, sweep
from benchmarks.coverage.measure import describe_plan
from benchmarks.coverage.sources import Case
from benchmarks.coverage.sources._common import NotBuilt, first_that_runs
from benchmarks.coverage.sources._transformers import _make
from benchmarks.coverage.sources._transformers_sizes import shrunken
from benchmarks.coverage.sweep_page import write_sweep_page


def test_the_share_counts_each_parameter_once() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    found = describe_plan(etp.trace(model, torch.randn(2, 5)), model)
    assert found["prunable"] == round((5 * 8 + 8 + 8 * 3) / (5 * 8 + 8 + 8 * 3 + 3), 4)
    assert found["locked"] == {"feeds the model's output": round(3 / (5 * 8 + 8 + 8 * 3 + 3), 4)}
    assert found["in_no_group"] == 0


def test_the_first_inputs_that_run_are_taken() -> None:
    model, inputs = first_that_runs([lambda: nn.Linear(3, 2)], lambda model: [torch.ones(1, 4), torch.ones(1, 3)])
    assert model(inputs).shape == (1, 2)
    with pytest.raises(NotBuilt, match="shapes"):
        first_that_runs([lambda: nn.Linear(3, 2)], lambda model: [torch.ones(1, 4)])


def _die(*arguments: object) -> None:
    os._exit(3)


@pytest.mark.parametrize(("last", "outcome"), [(lambda y: y, "exact"), (lambda y: y * 0 + 1, "unseen")])
def test_outputs_that_show_nothing_are_not_wrong(
    last: Callable[[Tensor], Tensor], outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return last(self.b(self.a(x)))

    monkeypatch.setattr(measure_module, "build", lambda case: (Net().eval(), torch.ones(2, 4)))
    assert measure_module.measure(Case(source="none", name="net", family="none"))["outcome"] == outcome


def test_a_process_that_dies_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "measure_into", _die)
    case = sources.Case(source="pyg", name="GCNConv", family="torch-geometric")
    line = sweep.run_apart(multiprocessing.get_context("fork"), case, seconds=30, gibibytes=4)  # type: ignore[arg-type]
    assert line["key"] == "pyg:GCNConv"
    assert line["outcome"] == "killed"


def test_the_page_counts_the_last_line_of_each_model(tmp_path: Path) -> None:
    line = {"key": "pyg:A", "family": "torch-geometric", "seconds": 1.0}
    good = {**line, "outcome": "exact", "prunable": 0.9, "in_no_group": 0.0, "locked": {}, "trace_seconds": 0.5}
    write_sweep_page([{**line, "outcome": "exception", "message": "TypeError"}, good], tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text(encoding="utf8")
    assert "1 of 1 models are exact" in text
    assert "TypeError" not in text


@pytest.mark.parametrize("source", sources.SOURCES)
def test_names_are_different(source: str) -> None:
    keys = [case.key for case in sources.cases((source,))]
    assert len(set(keys)) == len(keys)


def test_new_families_come_first_and_then_the_quick_ones() -> None:
    def case(family: str, number: int) -> Case:
        return Case(source="s", name=f"{family}{number}", family=family)

    cases = [case(family, number) for family in ("slow", "quick", "failing", "new") for number in range(3)]
    lines = [
        {"family": "slow", "seconds": 9.0, "outcome": "exact"},
        {"family": "quick", "seconds": 2.0, "outcome": "exact"},
        *[{"family": "failing", "seconds": 1.0, "outcome": outcome} for outcome in ("exact", *["not built"] * 3)],
    ]
    found = [each.family for each in sweep.in_order(cases, lines)]
    assert found == ["new", *["quick"] * 3, *["failing"] * 3, *["slow"] * 3, "new", "new"]
    assert sorted(each.key for each in sweep.in_order(cases, lines)) == sorted(each.key for each in cases)


def test_parts_of_a_small_model_keep_their_proportions() -> None:
    transformers = pytest.importorskip("transformers")
    config = shrunken(transformers.ViTConfig(), "parts")
    model = transformers.ViTModel(config)
    embedding = sum(p.numel() for p in model.embeddings.parameters())
    assert embedding < sum(p.numel() for p in model.parameters()) / 4
    assert (config.patch_size, config.image_size) == (8, 32)
    assert shrunken(transformers.ViTConfig(), "widths").patch_size == 16


def test_a_version_of_full_width_that_cannot_be_counted_is_not_built() -> None:
    class Config:
        pass

    class Net(nn.Linear):
        def __init__(self, config: object) -> None:
            super().__init__(4, 4)
            self.values = self.weight[0].tolist()  # fails on the meta device

    with pytest.raises(NotImplementedError):
        _make(Net, Config, "nothing")
    assert len(_make(Net, Config, "widths").values) == 4  # type: ignore[arg-type]
