"""Numbers that know where they come from: caches of functions, scales, comparisons, sizes of activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.graph._counted_sizes import CountedInt, counted_sizes
from etp_graph.graph._traced_numbers import current_numbers
from tests.support.models.constructs import Net


@lru_cache
def split_width(width: int, heads: int) -> tuple[int, int]:
    """Sizes of heads, as libraries for views compute and keep them."""
    return heads, width // heads


class Attention(nn.Module):
    """Attention whose sizes come out of a function with a cache."""

    def __init__(self, heads: int | None = 4) -> None:
        super().__init__()
        self.written = heads is None
        self.heads = heads or 4
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = split_width(16, 4 if self.written else self.heads)[0]
        q, k, v = (layer(x).unflatten(-1, (heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(((q @ k.mT * 0.3).softmax(-1) @ v).transpose(1, 2).flatten(2))


def heads_of(plan: etp.Plan) -> list[str]:
    return [group.name for group in plan.prunable if group.kind == "heads"]


@pytest.mark.parametrize("order", [(None, 4), (4, None), (4, 4)])
def test_a_cache_hands_out_no_number_of_another_module(order: tuple[int | None, int | None]) -> None:
    split_width.cache_clear()
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 16), *map(Attention, order), nn.Linear(16, 3)), torch.randn(2, 5, 5)
    plan = etp.trace(model, x, check=False)
    counted = {name: [(a.module, a.name) for a in plan[name].attributes] for name in heads_of(plan)}
    for at, heads in enumerate(order, 1):
        others = {(str(other), "heads") for other in (1, 2)} - {(str(at), "heads")}
        if heads is not None:
            assert (str(at), "heads") in counted[f"{at}.q"]
            assert not others & set(counted[f"{at}.q"])
    assert etp.verify(model, etp.trace(model, x), x).error < 1e-10


def test_a_cache_hands_out_no_number_in_the_trace_of_another_model() -> None:
    split_width.cache_clear()
    first = nn.Sequential(nn.Linear(5, 16), Attention(), nn.Linear(16, 3))
    second = Net(lambda n, x: n.b(n.middle(n.a(x))), a=nn.Linear(5, 16), middle=Attention(), b=nn.Linear(16, 3))
    for model, name in ((first, "1.q"), (second, "middle.q"), (first, "1.q")):
        assert heads_of(etp.trace(model, torch.randn(2, 5, 5))) == [name]
    assert all(type(size) is int for size in split_width(16, 4))


def test_a_number_of_an_earlier_trace_is_a_plain_one() -> None:
    first, second = Attention(), Attention()
    with counted_sizes(first):
        kept = first.heads
        assert isinstance(kept, CountedInt)
        assert kept.origin == ("", "heads", None)
    with counted_sizes(second):
        assert kept.origin is None
        float(kept)
        numbers = current_numbers()
        assert numbers is not None
        assert not numbers.values
    with counted_sizes(first):
        assert kept.origin == ("", "heads", None)


def test_lookups_find_a_number_under_its_value() -> None:
    module = Attention()
    with counted_sizes(module):
        assert {4: "found"}[module.heads] == "found"
        assert module.heads in {4, 5}
        assert module.heads in (4, 5)


class Scores(nn.Module):
    """Product of two projections, whose scale a function of the module and the queries computes."""

    def __init__(self, scale: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.scale, self.size, self.half = scale, 16, 8
        self.q, self.k, self.out = nn.Linear(5, 16), nn.Linear(5, 16), nn.Linear(7, 3)
        self.c, self.d = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (layer(x).view(*x.shape[:2], self.size) for layer in (self.q, self.k))
        return self.out(q @ k.transpose(1, 2) * self.scale(self, q)) + self.d(self.c(x).relu())


SCALES: dict[str, Callable[[Any, Tensor], Any]] = {
    "math.sqrt of an attribute": lambda m, q: 1 / math.sqrt(m.size),
    "power of an attribute": lambda m, q: m.size**-0.5,
    "quotient of an attribute": lambda m, q: 1 / m.size if m.size.__rtruediv__(1) else 0,
    "numpy of an attribute": lambda m, q: float(1 / np.sqrt(m.size)),
    "tensor of an attribute": lambda m, q: torch.tensor(m.size, dtype=q.dtype).rsqrt(),
    "part of an attribute": lambda m, q: (m.size // 2) ** -0.5,
    "math.sqrt of a size": lambda m, q: 1 / math.sqrt(q.shape[-1]),
    "power of a size": lambda m, q: q.size(-1) ** -0.5,
    "unpacked size": lambda m, q: (lambda b, t, c: (c * 2) ** -0.5)(*q.size()),
    "tensor of a size": lambda m, q: torch.sqrt(torch.tensor(q.shape[-1], dtype=q.dtype)),
    "count of a tensor": lambda m, q: (q.numel() / 14) ** -0.5,
    "float factor": lambda m, q: q.shape[2] * 0.1,
}


@pytest.mark.parametrize("name", SCALES)
def test_units_whose_number_is_a_scale_are_locked_without_the_check(name: str) -> None:
    torch.manual_seed(0)
    model, x = Scores(SCALES[name]), torch.randn(2, 7, 5)
    plan = etp.trace(model, x, check=False)
    assert [group.name for group in plan.prunable] == ["c"]
    assert "used as a value, such as a scale" in str(plan["q"].locked)
    etp.verify(model, plan, x)


@pytest.mark.parametrize(
    "use",
    [
        lambda m, q: 0.25,
        lambda m, q: m.half**-0.5,
        lambda m, q: q.shape[0] ** -0.5,
        lambda m, q: 0.1 * len(range(int(7 / q.shape[1]))),
        lambda m, q: 0.1 * round(m.size / 7),
    ],
)
def test_other_numbers_lock_nothing(use: Callable[[Any, Tensor], Any]) -> None:
    torch.manual_seed(0)
    model, x = Scores(use), torch.randn(2, 7, 5)
    plan = etp.trace(model, x, check=False)
    assert [group.name for group in plan.prunable] == ["q", "c"]


class Checked(nn.Module):
    """Convolution that compares the channels of its input with an attribute of its own, or a number."""

    def __init__(self, compare: Callable[[Any, Tensor], bool]) -> None:
        super().__init__()
        self.compare, self.channels, self.conv = compare, 16, nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.compare(self, x):
            raise ValueError(f"got {x.shape[1]} channels, not {self.channels}")
        return self.conv(x)


@pytest.mark.parametrize(
    "compare", [lambda m, x: x.shape[1] == m.channels, lambda m, x: m.channels == x.size(1),
                lambda m, x: x.shape == (2, m.channels, 4, 4)],
)  # fmt: skip
def test_an_attribute_that_is_compared_with_a_width_follows_it(compare: Callable[[Any, Tensor], bool]) -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(3, 16, 1), Checked(compare), nn.ReLU(), nn.Conv2d(16, 4, 1)),
        torch.randn(2, 3, 4, 4),
    )
    plan = etp.trace(model, x, check=False)
    assert ("1", "channels") in [(a.module, a.name) for a in plan["0"].attributes]
    etp.verify(model, plan, x)


def test_a_width_that_is_compared_with_a_number_in_the_code_is_locked() -> None:
    checked = Checked(lambda m, x: x.shape[1] == 16)
    plan = etp.trace(
        nn.Sequential(nn.Conv2d(3, 16, 1), checked, nn.Conv2d(16, 4, 1)), torch.randn(2, 3, 4, 4), check=False
    )
    assert "compared with a fixed one in '1'" in str(plan["0"].locked)


@pytest.mark.parametrize("how", ["shape", "size", "split"])
def test_halves_by_the_size_of_the_activation(how: str) -> None:
    def halves(y: Tensor) -> Tensor:
        n = y.size(1) if how == "size" else y.shape[1]
        left, right = y.split(n // 2, 1) if how == "split" else (y[:, : n // 2], y[:, n // 2 :])
        return left * right.sigmoid()

    torch.manual_seed(0)
    model, x = (
        Net(lambda n, x: n.b(halves(n.a(x))), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(4, 3, 1)),
        torch.randn(2, 3, 4, 4),
    )
    plan = etp.trace(model, x, check=False)
    assert [(group.name, group.n_units) for group in plan.prunable] == [("a", 4)]
    assert etp.verify(model, plan, x).error < 1e-10
