"""Moving averages lose the units of their model inside of the callbacks and of ``compress``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import etp_graph as etp
from etp_graph.integrations.core import Pruning

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], average: AveragedModel, pruning: Any) -> None:
    for step in range(1, 7):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(X).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        average.update_parameters(model)
        if pruning is not None:
            pruning.advance(step)


def test_an_average_goes_through_a_callback_with_two_optimizers() -> None:
    model = build()
    average = AveragedModel(model, avg_fn=lambda old, new, n: new)  # the last weights, so that it equals the model
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-3),
        torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], lr=1e-3),
    ]
    copies: list[nn.Module] = []
    pruning = Pruning(X[:1], prune_at=3, speed_up=2, also=copies)
    copies.append(average)
    pruning.begin(model, optimizers, total=6, per_epoch=None)
    train(model, optimizers, average, pruning)
    pruning.finish()
    assert model[0].out_features < 16  # type: ignore[index]
    assert average.module[0].out_features == model[0].out_features and same(average.module, model)  # type: ignore[index]


def test_a_copy_that_does_not_fit_is_refused_before_training() -> None:
    model = build()
    before = [p.detach().clone() for p in model.parameters()]
    pruning = Pruning(X[:1], prune_at=3, speed_up=2, also=nn.Linear(6, 3))
    with pytest.raises(etp.PlanError, match=r"also\[0\]"):
        pruning.begin(model, torch.optim.AdamW(model.parameters()), total=6, per_epoch=None)
    with pytest.raises(etp.PlanError, match=r"also\[0\]"):
        etp.compress(model, X[:1], train=print, evaluate=lambda _: 0.0, speed_up=2, also=[nn.Linear(6, 3)])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_training_resumes_after_surgery_with_copies_that_were_saved_and_no_others(tmp_path: Path) -> None:
    model = build()
    average = AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruning = Pruning(X[:1], prune_at=3, speed_up=2, also=average)
    pruning.begin(model, optimizer, total=6, per_epoch=None)
    train(model, [optimizer], average, pruning)
    state = pruning.state()
    kept = etp.load(etp.save(average.module, tmp_path / "average"), build=build)
    for also, fits in ((kept, True), (build(), False)):
        again = Pruning(X[:1], prune_at=3, speed_up=2, also=also)
        again.load_state(state)
        if fits:
            again.begin(model, optimizer, done=6, total=9, per_epoch=None)
            assert again.stage == "finetune" and same(kept, average.module)
        else:
            with pytest.raises(etp.CheckpointError, match=r"also\[0\]"):
                again.begin(model, optimizer, done=6, total=9, per_epoch=None)


def test_an_average_goes_through_all_rounds_of_compress(tmp_path: Path) -> None:
    model = build()
    average = AveragedModel(model, avg_fn=lambda old, new, n: new)

    def loop(model: nn.Module, phase: etp.Phase) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        phase.attach(optimizer, steps=6)
        train(model, [optimizer], average, None)

    options: Any = {
        "train": loop,
        "evaluate": lambda m: float(average(X).detach().mean()),
        "speed_up": 2.5,
        "progress": False,
    }
    options["also"] = average
    with pytest.raises(etp.CheckpointError, match="also"):
        etp.compress(model, X[:1], checkpoint=tmp_path / "run", **options)
    result = etp.compress(model, X[:1], rounds=2, **options)
    assert len(result.rounds) == 2 and result.speed_up >= 2.5 and same(average.module, model)
