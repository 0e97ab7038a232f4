"""Models of many levels are copied, or refused with a remedy; classes that a program makes are let go."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.model import copy_model, sizes_of_class


class Nested(nn.Module):
    def __init__(self, levels: int) -> None:
        super().__init__()
        self.inner: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        for _ in range(levels):
            outer = Nested.__new__(Nested)
            nn.Module.__init__(outer)
            outer.inner, self.inner = self.inner, outer

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_copy_of_two_hundred_levels_shares_nothing() -> None:
    model = Nested(200)
    model.add_module("tied", model.get_submodule("inner"))
    copied = copy_model(model)
    assert copied.tied is copied.inner
    assert [n for n, _ in copied.named_modules()] == [n for n, _ in model.named_modules()]
    assert not {id(m) for m in copied.modules()} & {id(m) for m in model.modules()}
    assert all(torch.equal(a, b) and a is not b for a, b in zip(copied.parameters(), model.parameters(), strict=True))


def test_two_hundred_levels_are_refused_with_a_remedy_that_works() -> None:
    model, x = Nested(200), torch.randn(2, 4)
    before = [list(vars(m)) for m in model.modules()]
    with pytest.raises(etp.PlanError, match=r"sys\.setrecursionlimit\("):
        etp.trace(model, x)
    assert [list(vars(m)) for m in model.modules()] == before
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10 * 204 + 1000)
    try:
        plan = etp.trace(model, x)
        assert etp.verify(model, plan, x).effect > 0
        etp.prune_(model, plan, etp.Selection({plan.prunable[0].name: torch.arange(8) < 5}))
    finally:
        sys.setrecursionlimit(limit)
    assert model(x).shape == (2, 2)


@pytest.mark.parametrize("base", [nn.Module, nn.Linear])
def test_sizes_of_a_class_do_not_keep_it_alive(base: type[nn.Module]) -> None:
    made = type("Made", (base,), {"width": 7})
    assert sizes_of_class(made) == {"width": 7} == sizes_of_class(made)
    gone = weakref.ref(made)
    del made
    gc.collect()
    assert gone() is None


def test_copies_of_buffers_share_memory_as_the_buffers_do() -> None:
    model = nn.Module()
    whole = torch.arange(6.0)
    model.register_buffer("whole", whole)
    model.register_buffer("part", whole[2:4])
    model.register_buffer("alone", torch.ones(3, 2).T)
    model.view = model.alone
    copied = copy_model(model, share=True)
    copied.whole.fill_(7)
    assert copied.part.tolist() == [7, 7]
    assert copied.view is copied.alone
    assert copied.alone.stride() == model.alone.stride()
    copied.alone.zero_()
    assert model.part.tolist() == [2, 3]
    assert bool(model.alone.all())
