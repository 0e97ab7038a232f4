"""Norms that are written by hand: recognised by what they compute, along any axis, with and without parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.model import _layer_table as layers
from etp_graph.standins import standing_in
from etp_graph.standins._norms import find_reduced_axis, norm_standin
from tests.support.models.constructs import Net


class Norm(nn.Module):
    """A norm with a forward of the test; parameters of the given shape, with values other than 1 and 0."""

    def __init__(self, run: Any, *shape: int, names: tuple[str, ...] = ("weight", "bias")) -> None:
        super().__init__()
        self.run = run
        for name in names if shape else ():
            self.register_parameter(name, nn.Parameter(torch.rand(shape) + 0.5))

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def channels_first(n: Any, x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    spread = (x - mean).pow(2).mean(1, keepdim=True)
    return n.weight[:, None, None] * ((x - mean) / torch.sqrt(spread + 1e-6)) + n.bias[:, None, None]


def channels_first_shaped(n: Any, x: Tensor) -> Tensor:
    var = torch.var(x, dim=1, unbiased=False, keepdim=True)
    return (x - x.mean(1, keepdim=True)) / (var + 1e-5).sqrt() * n.g + n.b


def annotated(n: Any, x: Tensor) -> Tensor:
    return n.a_2 * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + n.b_2


def without_mean(n: Any, x: Tensor) -> Tensor:
    return x / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * n.weight


def pixel(n: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-8)


IMAGE, TEXT = (2, 3, 6, 6), (2, 5, 3)
NORMS: dict[str, tuple[Norm, tuple[int, ...]]] = {
    "channels first": (Norm(channels_first, 12), IMAGE),
    "channels first, shaped parameters": (Norm(channels_first_shaped, 1, 12, 1, 1, names=("g", "b")), IMAGE),
    "annotated transformer": (Norm(annotated, 12, names=("a_2", "b_2")), TEXT),
    "without mean": (Norm(without_mean, 12, names=("weight",)), TEXT),
    "pixel norm": (Norm(pixel), IMAGE),
    "weightless function": (Norm(lambda n, x: F.layer_norm(x, x.shape[-1:])), TEXT),
    "weightless rms": (Norm(lambda n, x: F.rms_norm(x, x.shape[-1:])), TEXT),
}


@pytest.mark.parametrize("name", NORMS)
def test_units_before_a_norm_by_hand_can_be_removed(name: str) -> None:
    torch.manual_seed(0)
    norm, shape = NORMS[name]
    make: Any = (lambda a, b: nn.Conv2d(a, b, 1)) if shape is IMAGE else nn.Linear
    model = Net(lambda n, x: n.c(n.b(n.norm(n.a(x))).relu()), a=make(3, 12), norm=norm, b=make(12, 7), c=make(7, 4))
    x = torch.randn(shape)
    plan = etp.trace(model, x, prune="all", check=False)
    assert {"a", "b"} <= {group.name for group in plan.prunable}
    assert plan["a"].min_units == 2
    found = etp.verify(model, plan, x)
    assert found.error < 1e-10
    assert found.effect > 1e-3


def test_one_norm_without_parameters_serves_streams_of_several_widths() -> None:
    torch.manual_seed(0)
    parts = {"a": nn.Conv2d(3, 12, 1), "b": nn.Conv2d(12, 7, 1), "c": nn.Conv2d(7, 4, 1), "norm": Norm(pixel)}
    model, x = Net(lambda n, x: n.c(n.norm(n.b(n.norm(n.a(n.norm(x)))))), **parts), torch.randn(IMAGE)
    plan = etp.trace(model, x, check=False)
    assert {group.name: group.n_units for group in plan.prunable} == {"a": 12, "b": 7}
    assert etp.verify(model, plan, x).error < 1e-10


class Gated(nn.Module):
    """RMS norm with an optional gate, before or after the norm."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.weight, self.first, self.variance_epsilon = nn.Parameter(torch.rand(12) + 0.5), first, 1e-5

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is not None and self.first:
            x = x * F.silu(gate)
        x = self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return x * F.silu(gate) if gate is not None and not self.first else x


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("call", ["positional", "keyword", "none"])
def test_gated_norms(first: bool, call: str) -> None:
    calls = {"positional": lambda n, x: n.norm(n.a(x), n.g(x)), "keyword": lambda n, x: n.norm(n.a(x), gate=n.g(x)),
             "none": lambda n, x: n.norm(n.a(x), None)}  # fmt: skip
    run = calls[call]
    parts = {"a": nn.Linear(3, 12), "g": nn.Linear(3, 12), "norm": Gated(first), "b": nn.Linear(12, 4)}
    model, x = Net(lambda n, x: n.b(run(n, x)), **parts), torch.randn(2, 3)
    plan = etp.trace(model, x, prune="all", check=False)
    assert [group.name for group in plan.prunable] == ["a"]
    assert etp.verify(model, plan, x).error < 1e-10


def test_a_second_argument_that_is_no_gate_runs_the_modules_own_code() -> None:
    class Scaled(Norm):
        def forward(self, x: Tensor, scale: Any = None) -> Any:
            return (
                x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight * (1 if scale is None else scale)
            )

    model = Net(lambda n, x: n.b(n.norm(n.a(x), scale=x.sum())), a=nn.Linear(3, 12), b=nn.Linear(12, 4),
                norm=Scaled(None, 12, names=("weight",)))  # fmt: skip
    model.extra = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 3))
    inner = model.run
    model.run = lambda n, x: inner(n, n.extra(x))
    x = torch.randn(2, 3)
    with standing_in(model):
        assert type(model.norm) is not Scaled
    plan = etp.trace(model, x)
    assert "extra.0" in [group.name for group in plan.prunable]
    assert etp.verify(model, plan, x).error < 1e-10


@pytest.mark.parametrize(
    "run",
    [
        lambda n, x: x * torch.sigmoid(x),
        lambda n, x: x.flip(-1),
        lambda n, x: x.cumsum(-1),
        lambda n, x: x[..., :4],
        lambda n, x: x * torch.arange(x.shape[-1]),
    ],
)
def test_other_modules_are_no_norms(run: Any) -> None:
    assert find_reduced_axis(Norm(run)) is None
    assert norm_standin(Norm(run)) is None


def test_a_module_that_raises_anything_at_a_probe_is_no_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(12))

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] != 7:
                raise LookupError("only batches of 7")
            return x * self.weight

    assert norm_standin(Picky()) is None
    assert layers.counting_attributes(Picky()) == layers.CountingAttributes()


SKIPS: dict[str, tuple[Any, str]] = {
    "one layer": (lambda n, x: n.a(x), "neurons"),
    "two layers, multiplied": (lambda n, x: n.a(x) * n.b(x).sigmoid(), "neurons"),
    "a layer with a bias of its own": (lambda n, x: n.a(x) + n.shift, "neurons"),
    "a sum of two layers": (lambda n, x: n.a(x) + n.b(x), "stream"),
    "a skip path": (lambda n, x: (y := n.a(x)) + n.c(y), "stream"),
}


@pytest.mark.parametrize("name", SKIPS)
def test_only_sums_of_layers_before_a_norm_are_a_stream(name: str) -> None:
    torch.manual_seed(0)
    run, kind = SKIPS[name]
    parts = {"a": nn.Linear(3, 12), "b": nn.Linear(3, 12), "c": nn.Linear(12, 12), "norm": nn.LayerNorm(12)}
    model = Net(
        lambda n, x: n.out(n.norm(run(n, x))), **parts, shift=nn.Parameter(torch.randn(12)), out=nn.Linear(12, 4)
    )
    plan, x = etp.trace(model, torch.randn(2, 3), prune="all", check=False), torch.randn(2, 3)
    assert plan["a"].kind == kind
    assert etp.verify(model, plan, x).error < 1e-10


@pytest.mark.parametrize("both", [True, False])
def test_hidden_units_before_a_norm_are_of_one_kind(both: bool) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = 16 if both else 8
            self.rnn = nn.LSTM(4, 8, batch_first=True, bidirectional=both)
            self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(self.rnn(x)[0]))

    plan = etp.trace(Recurrent(), torch.randn(2, 5, 4))
    assert [group.kind for group in plan.prunable] == ["hidden"]
