"""Random plausible plans with their models on the meta device: no weights, no forward, any structure."""

from __future__ import annotations

import random
from itertools import accumulate

import torch
from torch import nn

from etp_graph.plan import Group, Op, Plan, Slice


class Builder:
    """Collects tensors, cost terms and groups."""

    def __init__(self) -> None:
        self.model = nn.Module()
        self.tensors: dict[str, tuple[int, ...]] = {}
        self.ops: list[Op] = []
        self.groups: list[Group] = []

    def tensor(self, name: str, *shape: int) -> str:
        module, leaf = name.split(".")
        if module not in dict(self.model.named_children()):
            self.model.add_module(module, nn.Module())
        self.model.get_submodule(module).register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta")))
        self.tensors[name] = shape
        return name

    def conv(self, name: str, out: int, into: int, area: int) -> str:
        weight = self.tensor(f"{name}.weight", out, into, 3, 3)
        self.ops.append(Op(name=name, coefficient=area * 9, axes=((weight, 0), (weight, 1))))
        return weight

    def group(self, name: str, n: int, outs: list[str], ins: list[tuple[str, int, int]], **constraints: int) -> None:
        """``outs``: tensors cut on axis 0; ``ins``: (tensor cut on axis 1, positions of one unit, first position)."""
        slices = [Slice(tensor=t, axis=0, index=range(n), unit=range(n)) for t in outs]
        for t, each, start in ins:
            unit = torch.arange(n).repeat_interleave(each)
            slices.append(Slice(tensor=t, axis=1, index=range(start, start + n * each), unit=unit))
        self.groups.append(Group(name=name, kind="channels", n_units=n, slices=tuple(slices), **constraints))

    def plan(self) -> Plan:
        return Plan(
            groups=tuple(self.groups),
            tensors=self.tensors,
            parameters=tuple(self.tensors),
            ops=tuple(self.ops),
            device="meta",
        )


def synthetic(
    seed: int, *, stages: int = 3, depth: int = 3, width: int = 16, coarse: int = 1
) -> tuple[nn.Module, Plan]:
    """A chain of residual stages: per stage one stream group and ``depth`` inner groups, and attention at the end.

    ``coarse`` scales the blocks and multiples that some groups get; 1 for none at all.
    """
    rng = random.Random(seed)
    net = Builder()
    before, last = 3, ""
    streams: dict[str, tuple[int, list[str], list[tuple[str, int, int]]]] = {}
    for stage in range(stages):
        n, area = rng.randint(2, width) * 4 * 2**stage, 4 ** (stages - stage)
        down = net.conv(f"s{stage}", n, before, area)
        if last:
            streams[last][2].append((down, 1, 0))
        last = f"s{stage}"
        streams[last] = (n, [down, net.tensor(f"n{stage}.bias", n)], [])
        for block in range(depth):
            inner = rng.randint(2, width) * 4
            first, second = (
                net.conv(f"{last}b{block}{part}", *shape, area)
                for part, shape in (("x", (inner, n)), ("y", (n, inner)))
            )
            streams[last][1].append(second)
            streams[last][2].append((first, 1, 0))
            rule = rng.choice([{}, {"blocks": 2}, {"multiple": 2}, {"blocks": 4, "multiple": 8}, {"min_units": 3}])
            rule = {name: min(value * coarse, inner // 4 if name == "min_units" else 4) for name, value in rule.items()}
            net.group(f"{last}b{block}", inner, [first], [(second, 1, 0)], **(rule if coarse > 1 else {}))
        before = n
    return _finish(net, streams, last, rng)


def _finish(net: Builder, streams: dict, last: str, rng: random.Random) -> tuple[nn.Module, Plan]:
    """Flatten to a classifier, and heads that share their positions with head dimensions: two units at one position."""
    n = streams[last][0]
    heads, size = rng.randint(2, 4), rng.randint(2, 6)
    value = net.tensor("attention.value", heads * size, n)
    streams[last][2].append((value, 1, 0))
    scale = net.tensor("attention.scale", heads * size)
    classifier = net.tensor("classifier.weight", 10, 4 * n)
    streams[last][2].append((classifier, 4, 0))
    width = sum(n for n, _, _ in streams.values())
    joint = net.conv("joint", 7, width, 1)  # reads all streams side by side
    for start, (_, _, ins) in zip(accumulate((n for n, _, _ in streams.values()), initial=0), streams.values()):
        ins.append((joint, 1, start))
    net.ops += [
        Op(name="attention", coefficient=49, axes=(("attention.value", 0), ("attention.value", 1))),
        Op(name="classifier", coefficient=1, axes=(("classifier.weight", 0), ("classifier.weight", 1))),
    ]
    for name, (n, outs, ins) in streams.items():
        net.group(name, n, outs, ins)
    index = range(heads * size)
    unit = torch.arange(heads * size)
    for kind, n_units, owner in (("heads", heads, unit // size), ("dimensions", size, unit % size)):
        cut = [value, scale] if kind == "heads" else [value]  # the scale belongs to heads alone
        pieces = tuple(Slice(tensor=tensor, axis=0, index=index, unit=owner) for tensor in cut)
        net.groups.append(Group(name=kind, kind=kind, n_units=n_units, slices=pieces))
    out = Slice(tensor="classifier.weight", axis=0, index=range(10), unit=range(10))
    net.groups.append(Group(name="out", kind="neurons", n_units=10, slices=(out,), locked="feeds the model's output"))
    rng.shuffle(net.groups)
    return net.model, net.plan()
