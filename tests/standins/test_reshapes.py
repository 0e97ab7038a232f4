"""Attention whose views take sizes from the shape of the input, under any name: its heads can be removed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp


class Base(nn.Module):
    heads_of_class = 4

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return ((q @ k.mT * 0.35).softmax(-1) @ v).transpose(1, 2)


class OtherName(Base):
    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = (f(x).reshape(b, n, self.num_heads, width // self.num_heads) for f in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v).reshape(b, n, width))


class ByIndex(Base):
    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = (
            f(x).reshape(x.shape[0], n, self.num_heads, x.shape[2] // self.num_heads) for f in (self.q, self.k, self.v)
        )
        return self.o(self.attend(q, k, v).reshape(x.shape))


class Local(Base):
    def forward(self, x: Tensor) -> Tensor:
        b, n, w = x.size()
        size = w // self.num_heads
        q, k, v = (f(x).view(b, n, self.num_heads, size) for f in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v).reshape(x.size()))


class LastSize(Base):
    def forward(self, x: Tensor) -> Tensor:
        size = x.size(-1) // self.num_heads
        q, k, v = (f(x).view(len(x), x.size(1), self.num_heads, size) for f in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v).reshape(len(x), x.size(1), x.size(-1)))


class OfClass(Base):
    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads_of_class, 8) for f in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v).flatten(2))


class TokensNamedAsWidth(Base):
    """The number of tokens has a name that is often one of a width."""

    def forward(self, x: Tensor) -> Tensor:
        b, hidden_size, num_channels = x.shape
        q, k, v = (
            f(x).reshape(b, hidden_size, self.num_heads, num_channels // self.num_heads)
            for f in (self.q, self.k, self.v)
        )
        return self.o(self.attend(q, k, v).reshape(b, hidden_size, num_channels))


def renamed(old: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a method as libraries do that give an argument another name."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                kwargs["x"] = kwargs.pop(old)
            return function(self, *args, **kwargs)

        return call

    return decorate


class Decorated(Base):
    @renamed("hidden")
    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = (f(x).reshape(b, n, self.num_heads, width // self.num_heads) for f in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v).reshape(b, n, width))


class DecoratedTwice(Base):
    @torch.no_grad()
    @renamed("hidden")
    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = (f(x).reshape(b, n, self.num_heads, width // self.num_heads) for f in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v).reshape(b, n, width))


@dataclass
class Config:
    n_head: int = 4


class InObject(Base):
    def __init__(self) -> None:
        super().__init__()
        del self.num_heads
        self.config = Config()

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.config.n_head, 8) for f in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v).flatten(2))


class InObjectByWidth(InObject):
    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (f(x).view(b, n, self.config.n_head, c // self.config.n_head) for f in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v).reshape(b, n, c))


class InObjectLocal(InObject):
    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        heads = self.config.n_head
        q, k, v = (f(x).view(b, n, heads, c // heads) for f in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v).reshape(b, n, -1))


class OverSpace(Base):
    """Heads over channels of an image, with sizes after them that are no widths."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.mT.unflatten(2, (-1, 1))
        b, c, h, w = x.shape
        q, k, v = (
            f(x.flatten(2).mT).mT.reshape(b, self.num_heads, c // self.num_heads, h * w)
            for f in (self.q, self.k, self.v)
        )
        return self.o((v @ (q.mT @ k * 0.35).softmax(-1).mT).reshape(b, -1, h * w).mT)


def model_with(cls: type[Base]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), cls(), nn.Linear(32, 3)).eval()


X = torch.randn(2, 5, 6)


@pytest.mark.parametrize(
    "cls",
    [
        OtherName,
        ByIndex,
        Local,
        LastSize,
        OfClass,
        OverSpace,
        InObject,
        InObjectByWidth,
        InObjectLocal,
        TokensNamedAsWidth,
        Decorated,
        DecoratedTwice,
    ],
)
def test_heads_can_be_removed_and_the_pruned_model_loads(cls: type[Base], tmp_path: Path) -> None:
    model = model_with(cls)
    plan = etp.trace(model, X)
    heads = [group for group in plan.prunable if group.kind == "heads"]
    assert [group.n_units for group in heads] == [4]
    assert etp.verify(model, plan, X).error < 1e-10
    etp.prune_(model, plan, etp.Selection({heads[0].name: torch.arange(4) != 1}))
    with torch.no_grad():
        out = model(X)
    assert Base.heads_of_class == 4
    etp.save(model, tmp_path / "pruned")
    loaded = etp.load(tmp_path / "pruned", build=lambda: model_with(cls))
    with torch.no_grad():
        assert torch.equal(loaded(X), out)


@pytest.mark.parametrize("cls", [InObject, InObjectByWidth, InObjectLocal])
def test_what_a_number_in_an_object_fixes_is_locked(cls: type[Base]) -> None:
    plan = etp.trace(model_with(cls), X, prune="all", check=False)
    assert [group.kind for group in plan.prunable if group.name.startswith("1.") and group.name != "1.o"] == ["heads"]
    assert etp.verify(model_with(cls), plan, X).error < 1e-10


def test_decorators_stay_around_a_forward_that_surgery_changed() -> None:
    model, x = model_with(Decorated), torch.randn(2, 5, 32)
    plan = etp.trace(model, X)
    etp.prune_(model, plan, etp.Selection({g.name: torch.arange(4) != 1 for g in plan.prunable if g.kind == "heads"}))
    assert model[1].num_heads == 3
    assert torch.equal(model[1](hidden=x), model[1](x))
    with pytest.raises(TypeError):
        model_with(OtherName)[1](hidden=x)


def test_a_decorator_that_cannot_be_repeated_leaves_the_heads_locked() -> None:
    kept: list[Callable[..., Any]] = []

    class Registered(Base):
        def forward(self, x: Tensor) -> Tensor:
            b, n, width = x.shape
            q, k, v = (f(x).reshape(b, n, self.num_heads, width // self.num_heads) for f in (self.q, self.k, self.v))
            return self.o(self.attend(q, k, v).reshape(b, n, width))

    kept.append(Registered.forward)
    Registered.forward = wraps(Registered.forward)(lambda self, x: kept[0](self, x))  # type: ignore[method-assign]
    plan = etp.trace(model_with(Registered), X, prune="all")
    assert all(group.kind != "heads" for group in plan.prunable)
    assert etp.verify(model_with(Registered), plan, X).error < 1e-10


def test_a_trace_leaves_sizes_of_classes_alone() -> None:
    model = model_with(OfClass)
    etp.trace(model, X)
    assert "heads_of_class" not in vars(model[1])
    assert type(model[1].heads_of_class) is int
