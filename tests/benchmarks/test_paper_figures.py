"""The papers' figures on filters: what is trained, what is recorded, and what the page says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.common.records import read_records
from benchmarks.papers import filters, filters_page
from benchmarks.papers.filters import FORCES, Network
from benchmarks.tasks.cifar10 import VGG19
from etp_graph.demo.zoo.models import VGG
from tests.support.models.benchmark_toy import Toy

BY_NAME = {force.name: force for force in FORCES}


class Noise(Toy):
    """The network of the figures, narrow, on noise."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def build(self) -> nn.Module:
        return VGG([c if isinstance(c, str) else c // 8 for c in VGG19], num_classes=8)


def test_strengths_are_those_of_the_papers_for_the_whole_training() -> None:
    pulls = {name: Network(Noise(), BY_NAME[name], steps=7) for name in ("Torque 1e-06", "Torque 1e-08", "ETP")}
    torque, weak, etp = (pulls[name].method for name in pulls)
    assert torque is not None and weak is not None and etp is not None
    # λ_T, and 391 steps of 128 images in each of 200 epochs: 0.1 until 100, 0.01 until 150, then 0.001; momentum 0.9
    published = 1e-6 * 391 * (100 * 0.1 + 50 * 0.01 + 50 * 0.001) / 0.1
    rates = [
        0.05 * (0.1 + 0.9 * s / 0.1) if s < 0.1 else 0.05 * (1 - 0.99 * (s - 0.1) / 0.9)
        for s in (i / 6 for i in range(7))
    ]
    assert torque.beta == pytest.approx(published / (sum(rates) / 0.1), rel=1e-6)
    assert weak.beta == pytest.approx(torque.beta / 100)
    assert etp.force != torque.force and etp.order == torque.order == "index"
    assert Network(Noise(), BY_NAME["no force"], steps=7).method is None


def test_a_network_is_cut_more_and_more_and_every_layer_keeps_its_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(Noise(), BY_NAME["no force"], steps=3)
    looks = network.train()
    assert len(looks) == 1  # before the first step; the next would be at the 20th
    weights = [m.weight for m in network.model.modules() if isinstance(m, nn.Conv2d)]
    for layer, weight in zip(network.filters(), weights, strict=True):
        assert layer == pytest.approx(weight.detach().abs().mean((1, 2, 3)).tolist(), abs=1e-6)
    curve = network.curve()
    shares = [share for share, _ in curve]
    assert shares == sorted(shares)
    assert all(asked <= share for asked, share in zip(filters.SHARES, shares, strict=False))
    monkeypatch.setattr(filters, "SHARES", (0.5, 0.9999))  # five filters of each layer stay
    assert [round(share, 2) for share, _ in network.curve()] == [0.5]


def test_a_force_brings_the_far_filter_nearer_to_zero() -> None:
    ends = {}
    for name in ("no force", "Torque 1e-06"):
        network = Network(Noise(), BY_NAME[name], steps=40)
        looks = network.train()
        ends[name] = looks[-1]
        units = filters.Units(network.model, network.plan).square_norms(network.model).detach().sqrt()
        span = network._span()
        assert looks[-1][1] == pytest.approx(
            float(units[span.start + round(254 / 255 * (span.stop - span.start - 1))]), abs=1e-4
        )
    assert ends["Torque 1e-06"][1] < 0.9 * ends["no force"][1]


def line(force: str, **changed: Any) -> dict[str, Any]:
    return {
        "config": {"force": force, "scale": "smoke", "steps": 40, "seed": 0}, "title": "a toy", "strength": 0.5,
        "published": 1e-6, "accuracy": 0.8, "curve": [[0.5, 0.79], [0.9, 0.3]], "filters": [[1.0, 1.0], [1e-5, 2.0]],
        "norms": [[1.0, 1.0], [0.5, 0.1]], "every": 20, "seconds": 60.0, "commit": "abc", "conditions": {"torch": "2"},
        **changed,
    }  # fmt: skip


def test_the_page_follows_from_the_lines(tmp_path: Path) -> None:
    lines = [
        line("no force", strength=None, published=None, filters=[[1.0, 1.0], [1.0, 1.0]]), line("Torque 1e-06"),
        line("ETP", published=None, curve=[[0.5, 0.2]]),
    ]  # fmt: skip
    text = filters_page.page(lines)
    assert text == filters_page.page(json.loads(json.dumps(lines)))
    assert "- Torque 1e-06: 80.0 % before surgery; 50 % of the parameters can go for at most 2 points. 25 % of" in text
    assert "- ETP: 80.0 % before surgery; less than a tenth of the parameters can go" in text
    assert "| Torque 1e-06 | 0.5 | 80.0 | 50 %: 79.0; 90 %: 30.0 |" in text
    written = filters_page.write(lines, tmp_path)
    assert all(path.stat().st_size > 1000 for path in written)
    assert all(f"images/{path.name}" in text for path in written if path.suffix == ".png")


def test_a_network_with_a_line_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def measure(task: Any, force: filters.Force, config: dict[str, Any]) -> dict[str, Any]:
        trained.append(force.name)
        return line(force.name, config=config)

    monkeypatch.setattr(filters, "make", lambda name, scale: Noise())
    monkeypatch.setattr(filters, "measure", measure)
    options = ["--scale", "smoke", "--passes", "2", "--results", str(tmp_path / "r.jsonl"), "--out", str(tmp_path)]
    filters.main(options)
    filters.main(options)
    assert trained == [force.name for force in FORCES]
    assert [one["config"]["steps"] for one in read_records(tmp_path / "r.jsonl")] == [10] * len(FORCES)
