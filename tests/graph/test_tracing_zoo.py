"""Outputs and gradients of pruned and masked model agree, for the architectures of torchvision and of CIFAR."""

from __future__ import annotations

import pytest
import torch

import etp_graph as etp
from tests.support.models.small_models import ZOO


@pytest.mark.parametrize("name", ZOO)
def test_pruned_is_masked(name: str) -> None:
    build, size = ZOO[name]
    torch.manual_seed(0)
    model = build()
    x = torch.randn(2, 3, size, size)
    plan = etp.trace(model, x, prune="all", check=False)
    found = etp.verify(model, plan, x, ratio=0.4)
    assert found.error < 1e-9
    assert found.gradient_error is not None
    assert found.gradient_error < 1e-6
    assert found.effect > 1e-3, "nothing was removed that mattered: the comparison says nothing"
    # Every convolution and every hidden linear layer can lose units.
    assert {group.locked for group in plan.groups} == {None, "feeds the model's output"}
    assert plan.unreached == ()
