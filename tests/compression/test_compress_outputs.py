"""What counts as an output is the same in every round, in callbacks and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.integrations.core import Pruning
from tests.support.command_line import invoke

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


class ShowsFeatures(nn.Module):
    """a (5 -> 8), b (8 -> 3); returns scores and features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.a(x).relu()
        return {"scores": self.b(features), "features": features}


def build() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return ShowsFeatures(), X


def train(model: nn.Module, phase: etp.Phase) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    phase.attach(optimizer, steps=2)
    for _ in range(2):
        optimizer.zero_grad()
        model(X)["scores"].square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("outputs", ["scores", lambda out: out["scores"]])
def test_compress_in_rounds(outputs: object, tmp_path: Path) -> None:
    model, _ = build()
    arguments = {"train": train, "evaluate": lambda m: m(X)["scores"].mean().item(), "speed_up": 1.5, "rounds": 2}
    with pytest.raises(etp.PlanError, match="without features a"):
        etp.compress(model, X, **arguments)
    result = etp.compress(model, X, **arguments, outputs=outputs, checkpoint=tmp_path / "run")
    assert len(result.rounds) == 2
    assert model(X)["features"].shape[1] < 8
    again, _ = build()
    etp.compress(again, X, **arguments, outputs=outputs, checkpoint=tmp_path / "run")
    torch.testing.assert_close(again(X), model(X))
    with pytest.raises(etp.PlanError, match="outputs have no effect"):
        etp.compress(build()[0], X, **arguments, outputs=outputs, plan=etp.trace(build()[0], X, outputs=outputs))


def test_a_callback() -> None:
    model, _ = build()
    pruning = Pruning(X, prune_at=1, speed_up=1.5, outputs="scores")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruning.begin(model, optimizer, total=2, per_epoch=None)
    assert pruning.plan is not None
    assert pruning.plan.left_out == ("features",)
    pruning.abort()
    with pytest.raises(etp.PlanError, match="no effect"):
        Pruning(X, prune_at=1, speed_up=1.5, outputs="scores", plan=pruning.plan)


def test_the_command_line(tmp_path: Path) -> None:
    model, file = f"{__name__}:build", tmp_path / "plan.json"
    assert invoke("inspect", model)[0] == 1
    code, out, _ = invoke("inspect", model, "--outputs", "scores", "--json", str(file))
    assert (code, json.loads(file.read_text())["left_out"]) == (0, ["features"])
    assert "features" in out.splitlines()[-1]
    assert invoke("verify", model, "--outputs", "scores")[0] == 0
    target = ("--params", "60", "--out", str(tmp_path / "pruned"))
    assert invoke("prune", model, "--outputs", "scores", *target)[0] == 0
    code, _, err = invoke("inspect", model, "--outputs", "logits")
    assert code == 1
    assert "names are scores, features" in err
