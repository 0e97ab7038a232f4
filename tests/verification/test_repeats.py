"""The check of models that are too large to be copied: one block of each repeated kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.graph import _trace
from etp_graph.verification import _repeats, _verify
from etp_graph.verification._repeats import copy_with_shared_blocks, count_numbers, find_repeated_blocks


class Block(nn.Module):
    """Attention and feed-forward around a residual stream."""

    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.heads, self.wrong = 4, wrong
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.register_buffer("scale", torch.full((1,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.norm1(x)
        q, k, v = (layer(y).view(b, t, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(((q @ k.mT * self.scale).softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))
        y = self.up(self.norm2(x)).relu()
        return x + self.down(y / y.stride(1) if self.wrong else y)  # a width that no rule sees


class Stack(nn.Module):
    def __init__(self, depth: int = 5, wrong: bool = False, device: str = "cpu") -> None:
        super().__init__()
        with torch.device(device):
            self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 3)
            self.blocks = nn.ModuleList(Block(wrong) for _ in range(depth))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IDS = torch.arange(12).view(2, 6) % 11


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_trace, "CHECK_LIMIT", 0)


def names(plan: etp.Plan) -> list[str]:
    return [group.name for group in plan.prunable]


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_large_model_gets_the_plan_of_the_whole_check(device: str) -> None:
    torch.manual_seed(0)
    plan = etp.trace(Stack(device=device), IDS, prune="all")
    whole = etp.trace(Stack(), IDS, prune="all", check=True)
    assert names(plan) == names(whole)
    assert len(names(plan)) == 5 * 4 + 1  # heads, two kinds of their dimensions, neurons; the stream
    assert not any("not checked" in note for note in plan.notes)
    assert plan.device == device


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_fails_in_one_block_is_locked_in_all_of_its_kind(device: str) -> None:
    torch.manual_seed(0)
    plan = etp.trace(Stack(wrong=True, device=device), IDS)
    assert names(plan) == [f"blocks.{i}.q" for i in range(5)]
    for i in range(5):
        assert str(plan[f"blocks.{i}.up"].locked).startswith("check failed")
    assert "in the equal block 'blocks.0'" in str(plan["blocks.3.up"].locked)


@pytest.mark.usefixtures("large")
def test_units_of_several_blocks_are_checked_in_all_of_them() -> None:
    class Wrong(Stack):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            for i, block in enumerate(self.blocks):
                x = block(x / x.stride(1) if i == 3 else x)
            return self.head(x)

    torch.manual_seed(0)
    plan = etp.trace(Wrong(), IDS, prune=("stream", "neurons"))
    assert str(plan["embed"].locked).startswith("check failed")
    assert names(plan) == [f"blocks.{i}.up" for i in range(5)]


def test_the_copy_holds_two_blocks_of_each_kind() -> None:
    model = Stack(depth=9)
    plan = etp.trace(model, IDS, check=False)
    repeated = find_repeated_blocks(model, plan)
    assert repeated.families == (tuple(f"blocks.{i}" for i in range(9)),)
    made = copy_with_shared_blocks(model, repeated, torch.float64)
    held = sum(tensor.numel() for tensor in (*made.parameters(), *made.buffers()))
    assert held == count_numbers(model, repeated) == count_numbers(Stack(depth=2), repeated)
    assert made.blocks[5].up.weight is made.blocks[1].up.weight
    assert made.blocks[0].up.weight is not made.blocks[1].up.weight
    assert made.embed.weight.dtype == torch.float64
    assert made.embed.weight is not model.embed.weight


def test_blocks_of_which_the_plan_says_something_else_have_their_own_tensors() -> None:
    class Mixed(Stack):
        def forward(self, ids: Tensor) -> Any:
            x = self.embed(ids)
            for i, block in enumerate(self.blocks):
                x = block(x)
                seen = block.up(x) if i == 2 else x
            return self.head(x), seen if len(self.blocks) == 3 else self.blocks[2].up(x)

    model = Mixed(depth=6)
    model.blocks[4].up.weight = model.blocks[5].up.weight
    plan = etp.trace(model, IDS, check=False)
    assert find_repeated_blocks(model, plan).families == (("blocks.0", "blocks.1", "blocks.3"),)


@pytest.mark.usefixtures("large")
def test_a_copy_that_does_not_fit_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_verify, "available_memory", lambda device: 1000)
    plan = etp.trace(Stack(), IDS)
    assert any("a copy with one block of each kind needs" in note for note in plan.notes)
    assert _repeats.find_repeated_blocks(Stack(), plan).families
