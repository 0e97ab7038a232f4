"""Parts of a tensor that become complex numbers keep its width even, whatever else lies beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp


class Rotated(nn.Module):
    """One projection gives hidden units and four numbers that are turned, as in DeepSeek-V2."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.hidden = nn.Linear(6, 11 + 4, bias=False), 11
        self.last, self.out = nn.Linear(11, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, turned = self.both(x).split([self.hidden, 4], -1)
        numbers = torch.view_as_complex(turned.reshape(*turned.shape[:-1], 2, 2))
        angle = torch.polar(torch.ones(2), torch.arange(2.0)).to(numbers.dtype)
        return self.last(hidden.relu()) + self.out(torch.view_as_real(numbers * angle).flatten(-2))


def test_the_width_stays_even() -> None:
    with pytest.raises(RuntimeError, match="stride divisible by 2"):
        Rotated()(torch.randn(5, 6))  # 11 + 4 numbers
    model = Rotated()
    model.both, model.hidden, model.last = nn.Linear(6, 12 + 4, bias=False), 12, nn.Linear(12, 3)
    x = torch.randn(5, 6)
    plan = etp.trace(model, x)
    assert plan["both"].multiple == 2 and plan["both"].locked is None
    etp.verify(model, plan, x)
    scores = etp.criteria.magnitude(model, plan)
    for share in (0.9, 0.75, 0.6, 0.45):
        selection = etp.allocate(model, plan, scores, budget=etp.Budget(params=share))
        assert int(selection.keep["both"].sum()) % 2 == 0


@pytest.mark.parametrize("rank", [16, 18])
def test_deepseek_v2_can_be_pruned(rank: int) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DeepseekV2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        first_k_dense_replace=1, kv_lora_rank=rank, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, topk_method="greedy", n_group=1, topk_group=1, use_cache=False, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model: Any = transformers.DeepseekV2ForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(3, 64, (4, 16))} for _ in range(3)]
    plan = etp.trace(model, batches[0])
    multiples = {group.name.rpartition("layers.1.")[2]: group.multiple for group in plan.prunable}
    assert multiples["self_attn.kv_a_proj_with_mqa"] == 2
    assert multiples["self_attn.q_b_proj"] == 1, "each head has an even number of channels"
    etp.verify(model, plan, batches[0])
    done = etp.oneshot_(model, batches, params=0.7, plan=plan)
    assert done.pruned.params <= 0.7 * done.dense.params
