"""From a traced model to its MACs after surgery: what was predicted is what is there, and it is what was asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import etp_graph as etp
from etp_graph.demo.zoo import models
from etp_graph.verification._sampling import randomize_

SPEED_UPS = (1.1, 1.3, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 9.0, 12.0)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "small-resnet": (models.SmallResNet, (1, 1, 8, 8)),
    "resnet20": (models.resnet20, (1, 3, 32, 32)),
    "densenet40": (models.densenet40, (1, 3, 32, 32)),
    "vgg11_bn": (lambda: torchvision.models.vgg11_bn(num_classes=10), (1, 3, 32, 32)),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10), (1, 3, 64, 64)),
    "resnext50": (lambda: torchvision.models.resnext50_32x4d(num_classes=10), (1, 3, 64, 64)),
    "regnet_y": (lambda: torchvision.models.regnet_y_400mf(num_classes=10), (1, 3, 64, 64)),
}


def macs_by_torch(model: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", MODELS)
def test_ten_budgets(name: str) -> None:
    make, shape = MODELS[name]
    model, x = make().eval(), torch.randn(shape)
    randomize_(model)
    plan = etp.trace(model, x, check=False)
    dense = etp.cost(model, plan)
    assert dense.macs == macs_by_torch(model, x)
    assert dense.params == sum(p.numel() for p in model.parameters())
    scores = etp.criteria.magnitude(model, plan)
    for speed_up in SPEED_UPS:
        selection = etp.allocate(model, plan, scores, budget=etp.Budget(speed_up=speed_up))
        predicted = etp.cost(model, plan, selection)
        pruned = copy.deepcopy(model)
        etp.prune_(pruned, plan, selection)
        assert predicted.macs == macs_by_torch(pruned, x)
        assert predicted.params == sum(p.numel() for p in pruned.parameters())
        assert 0.99 * dense.macs / speed_up <= predicted.macs <= dense.macs / speed_up


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
def test_parameter_budgets(share: float) -> None:
    model, x = models.resnet20(), torch.randn(1, 3, 32, 32)
    plan = etp.trace(model, x, check=False)
    target = int(share * sum(p.numel() for p in model.parameters()))
    scores = etp.criteria.magnitude(model, plan)
    etp.prune_(model, plan, etp.allocate(model, plan, scores, budget=etp.Budget(params=target)))
    assert 0.99 * target <= sum(p.numel() for p in model.parameters()) <= target


def test_identical_ten_lines_for_every_model() -> None:
    """The whole job, written once: trace, prove, score, allocate, prune, run."""
    for make, shape in list(MODELS.values())[:4]:
        model, x = make(), torch.randn(shape)
        plan = etp.trace(model, x)
        etp.verify(model, plan, x, ratio=0.5, gradients=False)
        selection = etp.allocate(model, plan, etp.criteria.etp(model, plan), budget=etp.Budget(speed_up=4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        etp.prune_(model, plan, selection, optimizer=optimizer)
        model.train()
        model(torch.cat([x, x + 1])).square().mean().backward()
        optimizer.step()
        assert model(x.repeat(2, 1, 1, 1)).isfinite().all()
