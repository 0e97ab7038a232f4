"""Integers that remember their attribute, and the sizes that calls write down."""

from __future__ import annotations

import enum
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.graph._counted_sizes import CountedInt, counted_sizes, written_sizes
from tests.support.selections import without_first_units


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width, self.one, self.flag, self._private = 6, 1, True, 7
        self.pair = (4, 2)
        self.mixed = (4, None)


def test_attributes_know_their_origin_inside_and_are_plain_afterwards() -> None:
    model = nn.Sequential(Holder())
    with counted_sizes(model):
        inner = model[0]
        assert isinstance(inner.width, CountedInt)
        assert inner.width.origin == ("0", "width", None)
        assert [item.origin for item in inner.pair] == [("0", "pair", 0), ("0", "pair", 1)]
        assert not any(isinstance(v, CountedInt) for v in (inner.one, inner.flag, inner._private, *inner.mixed))
    assert type(inner.width) is int
    assert all(type(item) is int for item in inner.pair)


def test_what_a_forward_writes_meanwhile_stays() -> None:
    model = Holder()
    with counted_sizes(model):
        model.width = 5
    assert model.width == 5


class Keeper(nn.Module):
    """Keeps what it computes from its sizes at every place that a forward may write to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 4)
        self.width, self.calls, self._private = 12, 5, 7
        self.past, self.table, self.pair = [7], {3: 4}, (3, 4)
        self.note = SimpleNamespace(n=2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self._private = self._private + self.width
        self.past.append(self.width + 1)
        self.table[self.width] = (self.width, [self.width])
        self.pair = (*self.pair, self.width)
        self.note.n = self.width
        self.note.inner = SimpleNamespace(n=self.calls)
        self.first.seen = self.width
        if not hasattr(self, "late"):
            self.late = nn.Linear(self.width, self.width)
        return self.last(self.late(self.first(x).relu()))


def counted_in(value: object, depth: int = 6) -> int:
    if type(value) is CountedInt:
        return 1
    if isinstance(value, dict):
        return sum(counted_in(part, depth) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple, set)):
        return sum(counted_in(part, depth) for part in value)
    return counted_in(vars(value), depth - 1) if depth and isinstance(value, (nn.Module, SimpleNamespace)) else 0


@pytest.mark.parametrize("check", [False, True])
def test_no_integer_of_ours_stays_in_the_model(check: bool) -> None:
    model, x = Keeper().eval(), torch.randn(2, 8)
    model(x)
    plan = etp.trace(model, x, check=check)
    assert counted_in(model) == 0 and type(model.calls) is int
    etp.verify(model, plan, x)
    assert counted_in(model) == 0
    with counted_sizes(model):
        model(x)
    assert counted_in(model) == 0 and model.calls == 7


def test_arithmetic_forgets_the_attribute_but_not_that_it_follows() -> None:
    size = CountedInt(6, ("m", "width", None))
    for made in (size * 2, 2 * size, size // 4, 12 // size, size + 1, 1 + size, size - 1):
        assert isinstance(made, CountedInt)
        assert made.origin is None
    assert (size // 3).whole is size
    assert (size // 4).whole is None
    assert isinstance(size / 2, float)


def test_sizes_as_calls_write_them() -> None:
    x, width = torch.zeros(2, 6), CountedInt(6, ("m", "width", None))
    for args in ((x, 2, width), (x, (2, width))):
        found = written_sizes(Tensor.view, args, {})
        assert found is not None
        assert found.named[1].origin == width.origin  # type: ignore[union-attr, attr-defined]
    pieces = written_sizes(Tensor.__getitem__, (x, (slice(None), slice(None, width))), {})
    assert pieces is not None
    assert pieces.pieces == {1: (0, 6)}
    assert written_sizes(Tensor.__getitem__, (x, (slice(None), slice(None, 3))), {}) is None, (
        "a number in the code is no size"
    )
    assert written_sizes(torch.add, (x, x), {}) is None


class Halves(nn.Module):
    """A split, a slice and a view by attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.groups, self.each = 4, 8, 4, 3
        self.first = nn.Linear(5, 12)
        self.left, self.right, self.all = nn.Linear(4, 2), nn.Linear(8, 2), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        left, right = x.split([self.a, self.b], dim=-1)
        whole = torch.cat([x[..., : self.a], x[..., self.a :]], -1)
        return self.left(left) + self.right(right) + self.all(whole.relu())


def test_splits_and_slices_by_attributes_follow_their_units() -> None:
    torch.manual_seed(0)
    model, x = Halves().eval(), torch.randn(3, 5)
    plan = etp.trace(model, x, check=False)
    assert sorted(g.n_units for g in plan.prunable) == [4, 8]
    etp.verify(model, plan, x)
    keep = torch.ones(plan.n_units, dtype=torch.bool)
    for group, span in plan.spans():
        if group.n_units == 4:
            keep[span.start] = False
    etp.prune_(model, plan, etp.Selection.from_flat(plan, keep))
    assert (model.a, model.b) == (3, 8)


def test_tracing_leaves_no_trace() -> None:
    model, x = Halves().eval(), torch.randn(3, 5)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    etp.trace(model, x)
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            assert type(value) is type(before[name][key]), f"{name}.{key}"


class Attention(nn.Module):
    """Attention with widths that NumPy computed."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = np.int64(4), np.prod([3, 1])
        self.q, self.k, self.v = (nn.Linear(12, self.heads * self.size) for _ in range(3))
        self.out = nn.Linear(self.heads * self.size, np.int32(12))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], self.heads, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2))


def test_widths_of_numpy_are_sizes_and_survive_a_file(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, np.int64(12)), Attention(), nn.Linear(12, 3)).eval()

    model, x = build(), torch.randn(2, 5, 12)
    plan = etp.trace(model, x)
    assert {group.kind for group in plan.prunable} == {"heads", "neurons"}
    assert isinstance(model[1].heads, np.int64) and etp.verify(model, plan, x).error < 1e-10
    etp.prune_(model, plan, without_first_units(plan))
    assert model[1].heads == 3
    assert torch.equal(etp.load(etp.save(model, tmp_path / "m"), build=build)(x), model(x))


class Mode(enum.IntEnum):
    SUM = 2


def test_a_member_of_an_enumeration_is_no_size() -> None:
    model = Holder()
    model.mode = Mode.SUM  # type: ignore[assignment]
    with counted_sizes(model):
        assert model.mode is Mode.SUM


def test_a_width_that_is_a_tensor_counts_units_and_a_counter_stays_a_tensor(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, torch.tensor(2) * 4), nn.Linear(8, 3)
            self.calls, self.shape = torch.tensor(5), (np.int64(2), 4)

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.second(self.first(x).view(len(x), *self.shape).flatten(1).relu())

    model, x = Counting().eval(), torch.randn(3, 6)
    assert isinstance(model.first.out_features, Tensor)
    plan = etp.trace(model, x, prune="all")
    assert etp.verify(model, plan, x).error < 1e-10
    etp.prune_(model, plan, without_first_units(plan))
    assert isinstance(model.calls, Tensor) and model(x).shape == (3, 3)
    assert torch.equal(etp.load(etp.save(model, tmp_path / "m"), build=Counting)(x), model(x))
