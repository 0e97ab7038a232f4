"""The remedies of the page on locks: code that locks units, and the same code after what the page advises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import etp_graph as etp

from .constructs import Net, image


@dataclass(frozen=True)
class Remedy:
    """A model that locks units, and one that opens them.

    Attributes:
        closed, opened: make the models.
        group: the group that the second one opens.
        x: the example inputs.
        options: of ``trace`` for the second one.
        before: of ``trace`` for the first one.
    """

    closed: Callable[[], nn.Module]
    opened: Callable[[], nn.Module]
    group: str = "a"
    x: Any = field(default_factory=lambda: image(2, 7, 6))
    options: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)


def between(operation: Callable[[Any, Tensor], Tensor], out: int = 8, **parts: Any) -> Callable[[], Net]:
    """A layer of 8 units, an operation, and a layer that reads ``out`` channels, beside two layers of their own."""

    def make() -> Net:
        layers: dict[str, Any] = {"a": nn.Linear(6, 8), "b": nn.Linear(out, 3)}
        layers |= {"c": nn.Linear(6, 5), "d": nn.Linear(5, 2)}
        net = Net(lambda n, x: (n.b(operation(n, n.a(x))), n.d(n.c(x))), **layers)
        net.width, net.half, net.parts, net.scale, net.plain = 8, 4, 2, 0.25, torch.arange(8.0)
        net.register_buffer("stored", torch.arange(8.0))
        for name, part in parts.items():
            setattr(net, name, part() if callable(part) else part)
        return net

    return make


def same(operation: Callable[[Any, Tensor], Tensor]) -> tuple[Callable[[], Net], Callable[[], Net]]:
    made = between(operation)
    return made, made


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def parametrized(layer: nn.Module, name: str = "weight") -> nn.Module:
    parametrize.register_parametrization(layer, name, Doubled())
    return layer


def stored_again(layer: nn.Module, name: str = "weight") -> nn.Module:
    parametrize.remove_parametrizations(layer, name)
    return layer


def heads(scale: bool) -> Callable[[], Net]:
    def run(n: Any, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (n.heads, -1)).transpose(1, 2) for f in (n.a, n.k, n.v))
        y = F.scaled_dot_product_attention(q, k, v, scale=n.scale if scale else None)
        found: Tensor = n.b(y.transpose(1, 2).flatten(2))
        return found

    def make() -> Net:
        net = Net(run, a=nn.Linear(6, 8), k=nn.Linear(6, 8), v=nn.Linear(6, 8), b=nn.Linear(8, 3))
        net.heads, net.scale = 2, 0.5
        return net

    return make


def normed(*widths: int, groups: int) -> Callable[[], Net]:
    def run(n: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return n.b(n.norm(torch.cat([n.a(x), n.e(x)], 1))), n.d(n.c(x))

    return lambda: Net(
        run, a=nn.Conv2d(3, widths[0], 1), e=nn.Conv2d(3, widths[1], 1), norm=nn.GroupNorm(groups, sum(widths)),
        b=nn.Conv2d(sum(widths), 3, 1), c=nn.Conv2d(3, 4, 1), d=nn.Conv2d(4, 2, 1),
    )  # fmt: skip


def one_norm(groups: int) -> Callable[[], Net]:
    return lambda: Net(
        lambda n, x: (n.b(n.norm(n.a(x))), n.d(n.c(x))), a=nn.Conv2d(3, 8, 1), norm=nn.GroupNorm(groups, 8),
        b=nn.Conv2d(8, 3, 1), c=nn.Conv2d(3, 4, 1), d=nn.Conv2d(4, 2, 1),
    )  # fmt: skip


def recurrent(run: Callable[[Any, Tensor], Tensor], **parts: Any) -> Callable[[], Net]:
    return lambda: Net(
        lambda n, x: (n.b(run(n, n.a(x))), n.d(n.c(x))), a=nn.Linear(6, 8), rnn=nn.LSTM(8, 5, batch_first=True),
        b=nn.Linear(5, 3), c=nn.Linear(6, 5), d=nn.Linear(5, 2), **{k: v() for k, v in parts.items()},
    )  # fmt: skip


def projected() -> Net:
    return Net(
        lambda n, x: (n.b(n.a(x)[0]), n.d(n.c(x))), a=nn.LSTM(6, 5, proj_size=4, batch_first=True), b=nn.Linear(4, 3),
        c=nn.Linear(6, 5), d=nn.Linear(5, 2),
    )  # fmt: skip


def without_projections() -> Net:
    net = projected().eval()
    plan = etp.trace(net, image(2, 7, 6), check=False)
    etp.prune_(net, plan, etp.Selection({"a#2": torch.tensor([True, True, False, False])}))
    return net


def half_fixed(net: Any, x: Tensor) -> Tensor:
    return torch.cat([net.e(x), net.plain[:4].expand(2, 7, 4)], -1)


def two_outputs() -> Net:
    return Net(lambda n, x: (n.b(n.a(x)), n.a(x)), a=nn.Linear(6, 8), b=nn.Linear(8, 3))


class Cached(nn.Module):
    """Keeps the features that it computes."""

    def __init__(self, *, keeps: bool) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(6, 5), nn.Linear(5, 2)
        self.keeps, self.features = keeps, None

    def forward(self, x: Tensor) -> Any:
        y = self.features if self.features is not None else self.a(x)
        if self.keeps:
            self.features = y
        return self.b(y), self.d(self.c(x))


class Centred(nn.Linear):
    """Layer whose weight has the mean zero."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight - self.weight.mean(1, keepdim=True), self.bias)


REMEDIES: dict[str, Remedy] = {
    "NAME also counts something of a fixed size": Remedy(
        between(lambda n, y: y.view(2, 7, n.width) + half_fixed(n, y).view(2, 7, n.width).sum(-1, keepdim=True),
                e=lambda: nn.Linear(8, 4)),
        between(lambda n, y: y.view(2, 7, n.width) + half_fixed(n, y).view(2, 7, n.both).sum(-1, keepdim=True),
                e=lambda: nn.Linear(8, 4), both=8),
    ),
    "NAME is also used outside its layer": Remedy(
        between(lambda n, y: y * n.a.weight.cumsum(0).mean()), between(lambda n, y: y * y.detach().pow(2).sum()),
    ),
    "NAME is taken by fixed positions in MODULE": Remedy(
        between(lambda n, y: y + n.table[:8], table=parameter(12)),
        between(lambda n, y: y + n.table[: y.shape[-1]], table=parameter(12)),
    ),
    "a view in MODULE writes their number": Remedy(
        between(lambda n, y: y.view(2, 7, 8)), between(lambda n, y: y.view(2, 7, -1))
    ),
    "convolution in groups over channels of fixed width in MODULE": Remedy(
        lambda: Net(lambda n, x: (n.b(n.a(x)), n.d(n.c(x))), a=nn.Conv2d(3, 6, 1, groups=3), b=nn.Conv2d(6, 2, 1),
                    c=nn.Conv2d(3, 4, 1), d=nn.Conv2d(4, 2, 1)),
        lambda: Net(lambda n, x: (n.b(n.a(n.first(x))), n.d(n.c(x))), first=nn.Conv2d(3, 3, 1),
                    a=nn.Conv2d(3, 6, 1, groups=3), b=nn.Conv2d(6, 2, 1), c=nn.Conv2d(3, 4, 1), d=nn.Conv2d(4, 2, 1)),
        group="first", x=image(),
    ),
    "each of its units fills one of 8 normalisation groups": Remedy(one_norm(8), one_norm(4), x=image()),
    "enters MODULE, whose weights are computed while running": Remedy(
        recurrent(lambda n, y: parametrized_rnn(n)(y)[0]), recurrent(lambda n, y: n.rnn(y)[0])
    ),
    "its weight is computed while running": Remedy(
        between(lambda n, y: n.e(y), e=lambda: Centred(8, 8)), between(lambda n, y: n.e(y), e=lambda: nn.Linear(8, 8)),
    ),
    "enters OPERATOR in MODULE with a weight that is computed while running": Remedy(
        between(lambda n, y: F.linear(y, n.m * 2), out=5, m=parameter(5, 8)),
        between(lambda n, y: F.linear(y, n.m), out=5, m=parameter(5, 8)),
    ),
    "weight is parametrized by CLASS: remove the parametrization before tracing": Remedy(
        between(lambda n, y: n.e(y), e=lambda: parametrized(nn.Linear(8, 8))),
        between(lambda n, y: n.e(y), e=lambda: stored_again(parametrized(nn.Linear(8, 8)))),
    ),
    "weight_norm is the deprecated one: use torch.nn.utils.parametrizations": Remedy(
        between(lambda n, y: n.e(y), e=lambda: nn.utils.weight_norm(nn.Linear(8, 8))),
        between(lambda n, y: n.e(y), e=lambda: weight_norm(nn.Linear(8, 8))),
    ),
    "feeds the model's output": Remedy(two_outputs, two_outputs, options={"outputs": "0"}),
    "gives the size of a new tensor in MODULE": Remedy(
        between(lambda n, y: y + torch.zeros(y.shape[-1] // 2).sum()),
        between(lambda n, y: y + torch.zeros_like(y).sum())
    ),
    "ignored (PATTERN)": Remedy(*same(lambda n, y: y.relu()), before={"ignore": "a"}),
    "kind ... is not among those to prune": Remedy(*same(lambda n, y: y), before={"prune": "channels"}, x=image(2, 6)),
    "kind 'stream' is pruned on request only: trace(..., prune=[..., 'stream'])": Remedy(
        *[lambda: Net(lambda n, x: n.b(n.norm(n.a(x) + n.e(n.a(x)))), a=nn.Linear(6, 8), e=nn.Linear(8, 8),
                      norm=nn.LayerNorm(8), b=nn.Linear(8, 3))] * 2, options={"prune": ["stream"]},
    ),
    "is broadcast over other units in MODULE": Remedy(
        between(
            lambda n, y: (y[..., None, None] * n.e(y)[..., None, :, None] * n.g(y)[..., None, None, :]).sum((-3, -2)),
            out=4, e=lambda: nn.Linear(8, 5), g=lambda: nn.Linear(8, 4),
        ),
        between(lambda n, y: n.e(y) * y.sum(-1, keepdim=True), out=5, e=lambda: nn.Linear(8, 5)),
    ),
    "is combined with a tensor of fixed width in MODULE": Remedy(
        between(lambda n, y: y * n.plain), between(lambda n, y: y * n.stored)
    ),
    "is kept by the model for later forwards": Remedy(lambda: Cached(keeps=True), lambda: Cached(keeps=False)),
    "is mixed by OPERATOR in MODULE": Remedy(
        between(lambda n, y: y.cumsum(-1)), between(lambda n, y: n.e(y), e=lambda: nn.Linear(8, 8))
    ),
    "is multiplied with a tensor of fixed width in MODULE": Remedy(
        between(lambda n, y: y @ n.matrix, out=5, matrix=torch.ones(8, 5)),
        between(lambda n, y: y @ n.matrix, out=5, matrix=parameter(8, 5)),
    ),
    "is split into pieces of fixed widths in MODULE": Remedy(
        between(lambda n, y: torch.mul(*y.split([4, 4], -1)), out=4),
        between(lambda n, y: torch.mul(*y.chunk(2, -1)), out=4)
    ),
    "is taken by fixed positions (slice) in MODULE": Remedy(
        between(lambda n, y: y[..., :4], out=4), between(lambda n, y: y[..., : n.half], out=4)
    ),
    "is taken from the end in MODULE": Remedy(
        between(lambda n, y: y[..., -4:], out=4), between(lambda n, y: y[..., : n.half], out=4)
    ),
    "its channels do not fill the 8 normalisation groups of MODULE evenly": Remedy(
        normed(5, 3, groups=4), normed(6, 2, groups=4), x=image()
    ),
    "leaves PyTorch by numpy() in MODULE": Remedy(
        between(lambda n, y: y + float(y.detach().numpy().mean())), between(lambda n, y: y + y.detach().sum())
    ),
    "meets a tensor that is computed while running": Remedy(
        between(lambda n, y: F.linear(y, n.m, n.v.cumsum(0)), out=5, m=parameter(5, 8), v=parameter(5)),
        between(lambda n, y: F.linear(y, n.m, n.v), out=5, m=parameter(5, 8), v=parameter(5)), group="m",
    ),
    "meets channels of fixed width in MODULE": Remedy(
        between(lambda n, y: y + torch.cat([n.e(y), n.plain[:4].expand(2, 7, 4)], -1), e=lambda: nn.Linear(8, 4)),
        between(lambda n, y: y + torch.cat([n.e(y), n.f(y)], -1), e=lambda: nn.Linear(8, 4), f=lambda: nn.Linear(8, 4)),
    ),
    "meets several axes of the parameter NAME": Remedy(
        between(lambda n, y: y + n.wide[0, :8], wide=parameter(3, 12)),
        between(lambda n, y: y + n.wide[0], wide=parameter(3, 8)),
    ),
    "the hidden size of MODULE stays above the size of its projections": Remedy(projected, without_projections),
    "the initial state of MODULE has a fixed size": Remedy(
        recurrent(lambda n, y: n.rnn(y, (torch.ones(1, len(y), 5), torch.ones(1, len(y), 5)))[0]),
        recurrent(lambda n, y: n.rnn(y)[0]), group="rnn",
    ),
    "their number (MODULE.NAME) is used as a value, such as a scale": Remedy(
        between(lambda n, y: y.view(2, 7, n.width) / n.width), between(lambda n, y: y.view(2, 7, n.width) * n.scale)
    ),
    "their number gives the size of other units in MODULE": Remedy(
        between(lambda n, y: n.e(y).view(2, 7, y.shape[-1]), e=lambda: nn.Linear(8, 8)),
        between(lambda n, y: n.e(y).view(2, 7, -1), e=lambda: nn.Linear(8, 8)),
    ),
    "their number is compared with a fixed one in MODULE": Remedy(
        between(lambda n, y: y if y.shape[-1] == 8 else y * 2),
        between(lambda n, y: y if y.shape[-1] == n.width else y * 2)
    ),
    "their number is used as a value, such as a scale, in MODULE": Remedy(
        between(lambda n, y: y / y.shape[-1] ** 0.5), between(lambda n, y: y * n.scale)
    ),
    "their number sets the attention scale in MODULE": Remedy(
        heads(False), heads(True), group="a.dims", options={"prune": "all"}, before={"prune": "all"}
    ),
}  # fmt: skip
"""Reason as the page writes it -> the remedy."""


def parametrized_rnn(net: Any) -> nn.Module:
    layer: nn.Module = net.rnn
    if not parametrize.is_parametrized(layer):
        parametrized(layer, "weight_hh_l0")
    return layer
