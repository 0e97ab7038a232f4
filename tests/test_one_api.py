"""One set of lines drives a convolutional network, a transformer, a graph network and a forecaster."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

import etp_graph as etp
from benchmarks.models import registry
from etp_graph.model import run_model, tensors_of


@pytest.mark.parametrize("name", ["cifar_resnet56", "hf:bert", "pyg:gat3", "informer"])
def test_identical_lines(name: str, tmp_path: Path) -> None:
    entry = registry()[name]
    model, inputs = entry.build(), entry.small()

    plan = etp.trace(model, inputs)
    regularizer = etp.Regularizer(model, plan, force=etp.forces.exponential(), beta=1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-7)  # the initial outputs are in the thousands
    with regularizer.attach(optimizer):
        sum(t.square().mean() for t in tensors_of(run_model(model, inputs))).backward()
        optimizer.step()
    scores = etp.criteria.etp(model, plan, regularizer=regularizer)
    selection = etp.allocate(model, plan, scores, budget=etp.Budget(speed_up=1.5))
    expected = etp.cost(model, plan, selection)
    dense = etp.cost(model, plan)
    etp.prune_(model, plan, selection, optimizer=optimizer)
    etp.save(model, tmp_path / "pruned")
    loaded = etp.load(tmp_path / "pruned", build=entry.build)

    assert dense.macs / expected.macs == pytest.approx(1.5, rel=0.1)
    assert sum(p.numel() for p in model.parameters()) == expected.params < dense.params
    model.eval(), loaded.eval()
    with torch.no_grad():
        got, want = tree_leaves(run_model(loaded, inputs)), tree_leaves(run_model(model, inputs))
    assert all(t.isfinite().all() for t in want if isinstance(t, torch.Tensor))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True) if isinstance(a, torch.Tensor))
