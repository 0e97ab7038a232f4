"""Experts whose weights are packed in one tensor each, in every layout: neurons and experts can be removed."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.standins._experts import experts_view

EXPERTS, WIDTH, NEURONS, TOP = 4, 12, 16, 2


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.top_k = EXPERTS, TOP
        self.weight, self.bias = nn.Parameter(torch.randn(EXPERTS, WIDTH)), nn.Parameter(torch.randn(EXPERTS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, index = F.linear(x, self.weight, self.bias).topk(self.top_k, -1)
        return values.softmax(-1), index


class Experts(nn.Module):
    """Experts with inputs on the second axis if ``transposed``, and gates and inputs in turns if ``interleaved``."""

    def __init__(self, *, transposed: bool, biased: bool, interleaved: bool) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = EXPERTS, WIDTH, NEURONS
        self.transposed, self.interleaved = transposed, interleaved
        wide, deep = (2 * NEURONS, WIDTH), (WIDTH, NEURONS)
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, *(wide[::-1] if transposed else wide)) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, *(deep[::-1] if transposed else deep)) * 0.3)
        self.gate_up_proj_bias = nn.Parameter(torch.randn(EXPERTS, 2 * NEURONS)) if biased else None
        self.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, WIDTH)) if biased else None

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = (both[..., ::2], both[..., 1::2]) if self.interleaved else both.chunk(2, -1)
        return F.silu(gate) * (up + 1)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, place = torch.where(index == expert)
            into, back = self.gate_up_proj[expert], self.down_proj[expert]
            into, back = (into, back) if self.transposed else (into.mT, back.mT)
            both = x[token] @ into
            if self.gate_up_proj_bias is not None:
                both = both + self.gate_up_proj_bias[expert]
            y = self._apply_gate(both) @ back
            if self.down_proj_bias is not None:
                y = y + self.down_proj_bias[expert]
            out = out.index_add(0, token, y * weights[token, place, None])
        return out


class Net(nn.Module):
    def __init__(self, **layout: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.router, self.experts = nn.Linear(5, WIDTH), Router(), Experts(**layout)
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        weights, index = self.router(h)
        out: Tensor = self.last(h + self.experts(h, index, weights))
        return out


LAYOUTS = [
    dict(zip(("transposed", "biased", "interleaved"), values, strict=True))
    for values in product((False, True), repeat=3)
]
X = torch.randn(10, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(k for k, v in layout.items() if v) or "plain")
def test_neurons_and_experts_can_be_removed(layout: dict[str, bool]) -> None:
    model = Net(**layout).eval()
    plan = etp.trace(model, X, prune="all", check=False)  # the plan itself is right, not only what the check leaves
    kinds = {group.kind: group for group in plan.prunable}
    assert kinds["neurons"].n_units == NEURONS
    assert kinds["experts"].n_units == EXPERTS
    assert etp.verify(model, plan, X).error < 1e-10
    keep = torch.arange(NEURONS) % 4 != 1
    etp.prune_(model, plan, etp.Selection({kinds["neurons"].name: keep}))
    assert model.experts.intermediate_dim == int(keep.sum())
    assert model.experts.gate_up_proj.numel() == EXPERTS * WIDTH * 2 * int(keep.sum())


def test_a_gate_of_another_form_is_not_taken_for_a_known_one() -> None:
    class Mirrored(Experts):
        def _apply_gate(self, both: Tensor) -> Tensor:
            gate, up = both.chunk(2, -1)
            return F.silu(gate) * up.flip(-1)

    model = Net(transposed=True, biased=False, interleaved=False).eval()
    model.experts = Mirrored(transposed=True, biased=False, interleaved=False)
    try:
        plan = etp.trace(model, X, prune="all", check=False)
    except etp.PlanError:
        return
    assert not any(s.tensor.startswith("experts.") and s.axis > 0 and group.n_units == NEURONS
                   for group in plan.prunable for s in group.slices)  # fmt: skip
    assert etp.verify(model, plan, X).error < 1e-10


def test_other_parameters_make_it_another_layer() -> None:
    model = Net(transposed=False, biased=False, interleaved=False).eval()
    model.experts.scale = nn.Parameter(torch.ones(NEURONS))
    plan = etp.trace(model, X, prune="all")
    assert etp.verify(model, plan, X).error < 1e-10


def test_experts_that_take_sorted_tokens_are_followed_by_their_operators() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        vocab_size=17, hidden_size=16, intermediate_size=12, intermediate_size_mlp=12, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, num_local_experts=3, pad_token_id=0,
    )  # fmt: skip
    model, ids = transformers.Llama4ForCausalLM(config).eval(), torch.randint(1, 17, (2, 5))
    for prune in (None, "all"):
        plan = etp.trace(model, ids, prune=prune)
        assert "model.layers.0.feed_forward.experts" in [group.name for group in plan.prunable]
        etp.verify(model, plan, ids)


def test_a_lack_of_memory_in_a_method_of_the_experts_is_raised() -> None:
    class Large(Experts):
        def _apply_gate(self, both: Tensor) -> Tensor:
            raise MemoryError("no room for the gates")

    with pytest.raises(MemoryError, match="no room for the gates"):
        experts_view(Large(transposed=False, biased=False, interleaved=False))
