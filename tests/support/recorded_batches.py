"""What a collector saw of a few batches, for the tests of criteria that need data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etp_graph import collect, criteria
from etp_graph.collect import Observations
from etp_graph.plan import Plan

COLLECTED = tuple(name for name in criteria.COLLECTED if name != "reap")
"""Criteria that need data of any model; experts are in ``test_reap.py``."""


def batches(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Three batches of images [8, 3, 8, 8], and two classes."""
    source = torch.Generator("cpu").manual_seed(5)
    labels = torch.arange(8, device="cpu") % 2
    return [(torch.randn(8, 3, 8, 8, generator=source, device="cpu").to(dtype), labels) for _ in range(3)]


def recorded(model: nn.Module, plan: Plan, criterion: str) -> Observations:
    """The record of a criterion, over :func:`batches`; the gradients of the model stay as they are."""
    kept = {name: p.grad for name, p in model.named_parameters()}
    training = model.training
    with collect.watch(model.eval(), plan, criterion) as record:
        for x, y in batches(next(model.parameters()).dtype):
            record.labels(y)
            loss = model(x).square().mean(1).mul(y + 1.0).sum()
            model.zero_grad(set_to_none=True)
            loss.backward()
    for name, p in model.named_parameters():
        p.grad = kept[name]
    model.train(training)
    return record
