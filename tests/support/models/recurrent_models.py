"""Small models around recurrent layers: what can be pruned in them, and what must be locked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tests.support.models.constructs import OUTPUT, Net

TEXT = torch.arange(20).view(5, 4) * 7 % 11  # [T, B] for batch_first=False
LENGTHS = torch.tensor([3, 5, 1, 4])
V, E, H = 11, 6, 8

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "relu": {"nonlinearity": "relu"},
    "two layers": {"num_layers": 2, "dropout": 0.5},
    "both ways": {"bidirectional": True},
    "two layers both ways": {"num_layers": 2, "bidirectional": True, "bias": False},
    "projected": {"proj_size": 3},
    "two layers both ways projected": {"num_layers": 2, "bidirectional": True, "proj_size": 3},
}
LANGUAGE = [
    (kind, option)
    for kind in KINDS for option, given in OPTIONS.items()
    if (kind == "lstm" or "proj_size" not in given) and (kind == "rnn" or "nonlinearity" not in given)
]  # fmt: skip


def language_model(kind: str, option: str) -> Net:
    layer = KINDS[kind](E, H, **OPTIONS[option])
    width = (layer.proj_size or H) * (1 + layer.bidirectional)
    parts = {"embed": nn.Embedding(V, E), "rnn": layer, "out": nn.Linear(width, V)}
    return Net(lambda n, text: n.out(n.rnn(n.embed(text))[0]), **parts)


def tied(layers: int) -> Net:
    """The decoder is the embedding: the units of the last layer are those of the embedding."""
    parts = {"embed": nn.Embedding(V, H), "rnn": nn.LSTM(H, H, layers), "out": nn.Linear(H, V)}
    parts["out"].weight = parts["embed"].weight
    return Net(lambda n, text: n.out(n.rnn(n.embed(text))[0]), **parts)


def reader(read: Callable[..., Tensor], kind: str = "lstm", width: int = H, **options: Any) -> Net:
    """A classifier of what ``read`` makes of a layer's result."""
    parts = {"embed": nn.Embedding(V, E), "rnn": KINDS[kind](E, H, **options), "out": nn.Linear(width, 3)}
    return Net(lambda n, text: n.out(read(*n.rnn(n.embed(text)))), **parts)


def packed(net: Any, text: Tensor) -> Tensor:
    sequence = pack_padded_sequence(net.embed(text), LENGTHS, enforce_sorted=False)
    out, (h, _) = net.rnn(sequence)
    assert isinstance(out, PackedSequence)
    padded, _ = pad_packed_sequence(out)
    return net.out(padded.mean(0) + torch.cat([h[-2], h[-1]], 1))


def cells(net: Any, text: Tensor) -> Tensor:
    state = second = None
    for x in net.embed(text):
        state = net.rnn(x, state)
        second = net.up(state[0] if isinstance(state, tuple) else state, second)
    return net.out(second)


def celled(cell: Any) -> Net:
    """Two cells, one on the other, in a loop over the steps."""
    return Net(cells, embed=nn.Embedding(V, E), rnn=cell(E, H), up=nn.GRUCell(H, 7), out=nn.Linear(7, 3))


def translated(net: Any, text: Tensor) -> Tensor:
    x = net.embed(text)
    return net.out(net.down(x, net.rnn(x)[1])[0])


def twice(net: Any, text: Tensor) -> Tensor:
    x = net.embed(text)
    _, state = net.rnn(x[:3])
    return net.out(net.rnn(x[3:], state)[0])


def by_direction(net: Any, text: Tensor) -> Tensor:
    out = net.rnn(net.embed(text))[0].unflatten(-1, (2, -1))
    return net.out(torch.cat([out[-1, :, 0], out[0, :, 1]], -1))


def residual(net: Any, text: Tensor) -> Tensor:
    x = net.rnn(net.embed(text))[0]
    return net.out(x + net.up(x)[0])


def parts(rnn: nn.Module, width: int = H, **more: nn.Module | nn.Parameter) -> dict[str, Any]:
    return {"embed": nn.Embedding(V, E), "rnn": rnn, "out": nn.Linear(width, 3), **more}


def beside(net: Any, text: Tensor) -> Tensor:
    x = net.embed(text)
    both = torch.cat([net.rnn(x)[0], net.up(x)[0]], -1)
    return net.out(both.view(*both.shape[:-1], 2, -1)[..., 1, :])


def learned(net: Any, text: Tensor) -> Tensor:
    return net.out(net.rnn(net.embed(text), net.start.expand(-1, 4, -1).contiguous())[0])


def conditioned(net: Any, text: Tensor) -> Tensor:
    x = net.embed(text)
    h = net.start(x.mean(0)).sigmoid().expand(2, -1, -1).contiguous()
    return net.out(net.rnn(x, (h, torch.zeros_like(h)))[0])


@dataclass(frozen=True)
class Case:
    """A model of :data:`TEXT` and what can be pruned: (kind, units, blocks) of each group, largest kind first."""

    net: Callable[[], nn.Module]
    groups: tuple[tuple[str, int, int], ...]


WORDS = ("features", E, 1)
LAYERS = {"num_layers": 2, "bidirectional": True}
CASES = {
    "tied embedding": Case(lambda: tied(1), (("features", H, 1),)),
    "tied embedding, two layers": Case(lambda: tied(2), (("features", 2 * H, 2),)),
    "last step": Case(lambda: reader(lambda out, _: out[-1], num_layers=2), (WORDS, ("hidden", 2 * H, 2))),
    "mean over the steps": Case(lambda: reader(lambda out, _: out.mean(0)), (WORDS, ("hidden", H, 1))),
    "state": Case(lambda: reader(lambda _, h: h[-1], "gru", num_layers=2), (WORDS, ("hidden", 2 * H, 2))),
    "state, unbound": Case(
        lambda: reader(lambda _, h: h[1].unbind(0)[1], num_layers=3), (WORDS, ("hidden", 3 * H, 3))
    ),
    "state of both directions": Case(
        lambda: reader(lambda _, h: torch.cat([h[0][-2], h[0][-1]], 1), width=2 * H, **LAYERS),
        (WORDS, ("hidden", 4 * H, 4)),
    ),
    "states of all layers": Case(
        lambda: reader(lambda _, h: h.transpose(0, 1).flatten(1), "gru", 4 * H, **LAYERS), (WORDS, ("hidden", 4 * H, 4))
    ),
    "state viewed by layer and direction": Case(
        lambda: reader(lambda _, h: h[0].view(2, 2, 4, -1)[-1, 0], **LAYERS), (WORDS, ("hidden", 4 * H, 4))
    ),
    "sum of the last layer's states": Case(
        lambda: reader(lambda _, h: h[-2:].sum(0), "gru", **LAYERS), (WORDS, ("hidden", 3 * H, 3))
    ),
    "sum of the directions": Case(
        lambda: reader(lambda out, _: out.view(5, 4, 2, -1).sum(2), "gru", **LAYERS), (WORDS, ("hidden", 3 * H, 3))
    ),
    "last step of each direction": Case(
        lambda: Net(by_direction, **parts(nn.LSTM(E, H, bidirectional=True), 2 * H)), (WORDS, ("hidden", 2 * H, 2))
    ),
    "one weight for all states": Case(
        lambda: reader(lambda _, h: h, "gru", num_layers=2), (WORDS, ("hidden", H, 1))
    ),
    "projected state and cell": Case(
        lambda: reader(lambda _, h: torch.cat([h[0][-1], h[1][-1]], 1), width=3 + H, num_layers=2, proj_size=3),
        (WORDS, ("hidden", 2 * H, 2), ("projections", 6, 2)),
    ),
    "packed": Case(lambda: Net(packed, **parts(nn.LSTM(E, H, **LAYERS), 2 * H)), (WORDS, ("hidden", 4 * H, 4))),
    "unbatched": Case(
        lambda: Net(lambda n, text: n.out(n.rnn(n.embed(text[:, 0]))[1][-1]), **parts(nn.GRU(E, H, 2))),
        (WORDS, ("hidden", 2 * H, 2)),
    ),
    "lstm cells": Case(lambda: celled(nn.LSTMCell), (WORDS, ("hidden", 7, 1), ("hidden", H, 1))),
    "gru cells": Case(lambda: celled(nn.GRUCell), (WORDS, ("hidden", 7, 1), ("hidden", H, 1))),
    "rnn cells": Case(lambda: celled(nn.RNNCell), (WORDS, ("hidden", 7, 1), ("hidden", H, 1))),
    "encoder and decoder": Case(
        lambda: Net(translated, **parts(nn.LSTM(E, H, 2), down=nn.LSTM(E, H, 2))), (WORDS, ("hidden", 2 * H, 2))
    ),
    "encoder of two directions, decoder of two layers": Case(
        lambda: Net(translated, **parts(nn.GRU(E, H, bidirectional=True), down=nn.GRU(E, H, 2))),
        (WORDS, ("hidden", 2 * H, 2)),
    ),
    "carried on": Case(lambda: Net(twice, **parts(nn.LSTM(E, H, 2))), (WORDS, ("hidden", 2 * H, 2))),
    "residual": Case(
        lambda: Net(residual, **parts(nn.LSTM(E, H, 2), up=nn.GRU(H, H, 2))), (WORDS, ("hidden", 3 * H, 3))
    ),
    "two modules side by side, in a view": Case(
        lambda: Net(beside, **parts(nn.LSTM(E, H), up=nn.LSTM(E, H))), (WORDS, ("hidden", H, 1))
    ),
    "learned initial state": Case(
        lambda: Net(learned, **parts(nn.GRU(E, H), start=nn.Parameter(torch.randn(1, 1, H)))),
        (WORDS, ("hidden", H, 1)),
    ),
    "computed initial state": Case(
        lambda: Net(conditioned, **parts(nn.LSTM(E, H, 2), start=nn.Linear(E, H))), (WORDS, ("neurons", H, 1))
    ),
}  # fmt: skip


def of_slices(net: Any, text: Tensor) -> Tensor:
    out = net.rnn(net.embed(text))[0]
    return net.out(torch.cat([out[-1, :, :H], out[0, :, H:]], -1))


def gated(net: Any, text: Tensor) -> Tensor:
    left, right = net.rnn(net.embed(text))[0].chunk(2, -1)
    return net.out(left * right.sigmoid())


LOCKED = {
    "zeros of a fixed width": (
        lambda: Net(lambda n, t: n.out(n.rnn(n.embed(t), torch.zeros(2, 4, H))[0]), **parts(nn.GRU(E, H, 2))),
        "initial state of 'rnn' has a fixed size",
    ),
    "zeros of a fixed width for a cell": (
        lambda: Net(lambda n, t: n.out(n.rnn(n.embed(t)[0], torch.zeros(4, H))), **parts(nn.GRUCell(E, H))),
        "initial state of 'rnn' has a fixed size",
    ),
    "the output": (lambda: Net(lambda n, t: n.rnn(n.embed(t))[0], **parts(nn.LSTM(E, H, 2))), OUTPUT),
    "the state as an output": (
        lambda: Net(lambda n, t: ((r := n.rnn(n.embed(t)))[1][1][0], n.out(r[0])), **parts(nn.LSTM(E, H, 2))), OUTPUT
    ),
    "slices of the directions": (
        lambda: Net(of_slices, **parts(nn.GRU(E, H, bidirectional=True), 2 * H)), "fixed positions"
    ),
    "one unit of the states": (
        lambda: Net(lambda n, t: n.out(n.rnn(n.embed(t))[1][:, :, 0]), **parts(nn.GRU(E, H, 2), 4)), "fixed positions"
    ),
    "halves of the last layer": (lambda: Net(gated, **parts(nn.GRU(E, H, 2), H // 2)), "leaves them unequal"),
    "weights computed while running": (
        lambda: Net(lambda n, t: n.out(n.rnn(n.embed(t))[0]), **parts(weight_norm(nn.GRU(E, H), "weight_hh_l0"))), None
    ),
    "as many projections as fit": (
        lambda: Net(lambda n, t: n.out(n.rnn(n.embed(t))[0]), **parts(nn.LSTM(E, H, proj_size=H - 1), H - 1)),
        "above the size of its projections",
    ),
}  # fmt: skip
