"""Attention whose keys have a part that all heads share, or whose heads are normalised one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from tests.support.models.constructs import Net


def deepseek() -> nn.Module:
    """Multi-head latent attention: keys of all heads end with one rotated part."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=17, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=6, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=5,
        first_k_dense_replace=2,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)


def llama4() -> nn.Module:
    """Queries and keys that are divided by their length, in each head."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=17, hidden_size=16, intermediate_size=12, intermediate_size_mlp=12, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=4, num_local_experts=2, moe_layers=[], use_qk_norm=True,
        pad_token_id=0,
    )  # fmt: skip
    return Llama4ForCausalLM(config)


@pytest.mark.parametrize("make", [deepseek, llama4])
def test_heads_are_open(make: Any) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, ids = make().eval(), {"input_ids": torch.randint(1, 17, (2, 5))}
    plan = etp.trace(model, ids, check=False)
    heads = [group for group in plan.prunable if group.kind == "heads"]
    assert [group.n_units for group in heads] == [4, 4]
    assert etp.verify(model, plan, ids).error < 1e-6  # Llama 4 computes norms in float32
    etp.prune_(model, plan, etp.Selection({group.name: torch.tensor([True, False, True, True]) for group in heads}))
    again = etp.trace(model, ids, check=False)
    assert [group.n_units for group in again.prunable if group.kind == "heads"] == [3, 3]
    assert etp.verify(model, again, ids).error < 1e-6


class SharedKey(nn.Module):
    """Attention whose keys have a part for each head, and a part that all heads share."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.heads, self.scale = how, 4, 0.3
        self.q, self.k, self.v = nn.Linear(8, 4 * 6), nn.Linear(8, 4 * 4), nn.Linear(8, 4 * 5)
        self.shared, self.out = nn.Linear(8, 2), nn.Linear(4 * 5, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        shared = self.shared(x).view(b, 1, n, 2).expand(-1, k.shape[1], -1, -1)
        if self.how == "joined":
            k = torch.cat([k, shared], -1)
        elif self.how == "added":
            k = torch.cat([k, k[..., :2] + shared], -1)
        return self.out(((q @ k.mT * self.scale).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("how", ["joined", "added"])
def test_a_part_that_all_heads_share_does_not_lock_them(how: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 8), SharedKey(how), nn.Linear(8, 2)).eval(), torch.randn(2, 5, 3)
    plan = etp.trace(model, x, prune="all", check=False)
    assert [group.n_units for group in plan.prunable if group.kind == "heads"] == [4]
    assert etp.verify(model, plan, x).error < 1e-10


@pytest.mark.parametrize("stored", [False, True])
def test_units_stay_open_if_only_the_other_operand_is_broadcast(stored: bool) -> None:
    def run(n: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = n.table if stored else n.g(x.mean((2, 3)))[:, None, None]
        return n.b((n.a(x) * gate).relu()), n.d(n.g(x.mean((2, 3))))

    model = Net(run, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1), g=nn.Linear(3, 6), d=nn.Linear(6, 2))
    model.table = nn.Parameter(torch.randn(6))
    x = torch.randn(2, 3, 6, 6)
    plan = etp.trace(model, x, check=False)
    assert [group.name for group in plan.prunable] == (["a", "g"] if stored else ["a"])
    assert etp.verify(model, plan, x).error < 1e-10


@pytest.mark.parametrize("swapped", [False, True])
def test_of_two_axes_of_units_one_stays_open(swapped: bool) -> None:
    def run(n: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = n.a(x)[:, :, None], n.b(x)[:, None]
        return n.last((b * a if swapped else a * b).relu()).sum(1), n.other(n.a(x))

    model = Net(run, a=nn.Linear(5, 8), b=nn.Linear(5, 6), last=nn.Linear(6, 3), other=nn.Linear(8, 2))
    plan, x = etp.trace(model, torch.randn(4, 5), check=False), torch.randn(4, 5)
    assert [group.name for group in plan.prunable] == ["b"]
    assert "is broadcast over other units" in str(plan["a"].locked)
    assert etp.verify(model, plan, x).error < 1e-10
