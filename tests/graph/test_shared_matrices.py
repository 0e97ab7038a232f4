"""Products of activations that use one matrix for several: keys and values that all heads share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import etp_graph as etp
from tests.support.selections import without_first_units

TOKENS = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0))

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def softmax(scores: Tensor) -> Tensor:
    return (scores * 0.4).softmax(-1)


def by_einsum(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return torch.einsum("bhnm,bmd->bhnd", softmax(torch.einsum("b h n d, b m d -> b h n m", q, k)), v)


def expanded(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    k, v = (x.unsqueeze(1).expand(-1, heads, -1, -1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=0.4)


WAYS: dict[str, Attend] = {
    "matmul": lambda q, k, v, heads: softmax(q @ k.unsqueeze(1).mT) @ v.unsqueeze(1),
    "function": lambda q, k, v, heads: torch.matmul(softmax(torch.matmul(q, k[:, None].transpose(-1, -2))), v[:, None]),
    "attention": lambda q, k, v, heads: F.scaled_dot_product_attention(q, k[:, None], v[:, None], scale=0.4),
    "expanded": expanded,
    "einsum": by_einsum,
}


class MultiQuery(nn.Module):
    """Attention with one head of keys and values for all heads of queries (Shazeer 2019)."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend, self.heads, self.size = attend, 4, 3
        self.q, self.k, self.v, self.out = nn.Linear(12, 12), nn.Linear(12, 3), nn.Linear(12, 3), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(*x.shape[:2], self.heads, self.size).transpose(1, 2)
        y = self.attend(q, self.k(x), self.v(x), self.heads)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("way", WAYS)
def test_query_heads_of_shared_keys_are_units(way: str) -> None:
    model = nn.Sequential(nn.Linear(12, 12), MultiQuery(WAYS[way]), nn.Linear(12, 3)).eval()
    plan = etp.trace(model, TOKENS, prune="all")
    kinds = {group.kind: group.n_units for group in plan.prunable if group.kind != "neurons"}
    assert kinds == {"heads": 4, "head_dims": 3}
    assert etp.verify(model, plan, TOKENS).error < 1e-10
    selection = without_first_units(plan)
    expected = etp.cost(model, plan, selection)
    etp.prune_(model, plan, selection)
    assert (model[1].heads, model[1].q.out_features, model[1].k.out_features) == (3, 6, 2)
    assert etp.cost(model, etp.trace(model, TOKENS, prune="all")).macs == expected.macs
