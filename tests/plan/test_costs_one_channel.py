"""Graph attention with one channel has the cost that the plan of the wider model predicts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp

EDGES = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        layers = pytest.importorskip("torch_geometric.nn")
        self.layer, self.head = getattr(layers, name)(6, 4, heads=1), nn.Linear(4, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.head(self.layer(x, edges).relu())


@pytest.mark.parametrize("name", ["GATConv", "GATv2Conv", "SuperGATConv", "TransformerConv"])
@pytest.mark.parametrize("kept", [1, 2])
def test_predicted_and_real_costs_agree(name: str, kept: int) -> None:
    torch.manual_seed(0)
    model = Attention(name)
    plan = etp.trace(model, (X, EDGES), prune="all")
    group = next(g for g in plan.prunable if g.n_units == 4)
    selection = etp.Selection({group.name: torch.arange(4) < kept})
    pruned = copy.deepcopy(model)
    etp.prune_(pruned, plan, selection)
    predicted, real = etp.cost(model, plan, selection), etp.cost(pruned, etp.trace(pruned, (X, EDGES), check=False))
    assert (predicted.macs, predicted.params) == (real.macs, real.params)
