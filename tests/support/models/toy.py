"""A network small enough to write its plan by hand: what the tracer must find, and a fixture that needs no tracer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etp_graph.model import named_tensors
from etp_graph.plan import Attribute, Group, Op, Plan, Slice


class Toy(nn.Module):
    """conv1 (3 -> 8), norm, relu, conv2 (8 -> 6), pool to 2x2, flatten, linear (24 -> 5); input [n, 3, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.linear = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.norm(self.conv1(x)).relu()).relu()
        return self.linear(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def toy_plan() -> Plan:
    """The plan of :class:`Toy` for one example input [1, 3, 8, 8], by hand."""
    model = Toy()
    norm = [Slice(tensor=f"norm.{n}", axis=0, index=range(8), unit=range(8))
            for n in ("weight", "bias", "running_mean", "running_var")]  # fmt: skip
    units = torch.arange(6).repeat_interleave(4)
    first = Group(
        name="conv1", kind="channels", n_units=8,
        slices=(Slice(tensor="conv1.weight", axis=0, index=range(8), unit=range(8)), *norm,
                Slice(tensor="conv2.weight", axis=1, index=range(8), unit=range(8))),
        attributes=tuple(Attribute(module=m, name=n, item=None, index=range(8), unit=range(8))
                         for m, n in (("conv1", "out_channels"), ("norm", "num_features"), ("conv2", "in_channels"))),
    )  # fmt: skip
    second = Group(
        name="conv2", kind="channels", n_units=6,
        slices=(Slice(tensor="conv2.weight", axis=0, index=range(6), unit=range(6)),
                Slice(tensor="conv2.bias", axis=0, index=range(6), unit=range(6)),
                Slice(tensor="linear.weight", axis=1, index=range(24), unit=units)),
        attributes=(Attribute(module="conv2", name="out_channels", item=None, index=range(6), unit=range(6)),
                    Attribute(module="linear", name="in_features", item=None, index=range(24), unit=units)),
    )  # fmt: skip
    last = Group(
        name="linear", kind="neurons", n_units=5,
        slices=(Slice(tensor="linear.weight", axis=0, index=range(5), unit=range(5)),
                Slice(tensor="linear.bias", axis=0, index=range(5), unit=range(5))),
        locked="feeds the model's output",
    )  # fmt: skip
    return Plan(
        groups=(first, second, last),
        tensors={name: tuple(t.shape) for name, t in named_tensors(model)},
        parameters=tuple(name for name, _ in model.named_parameters()),
        ops=(Op(name="conv1", coefficient=64 * 9, axes=(("conv1.weight", 0), ("conv1.weight", 1))),
             Op(name="conv2", coefficient=64 * 9, axes=(("conv2.weight", 0), ("conv2.weight", 1))),
             Op(name="linear", coefficient=1, axes=(("linear.weight", 0), ("linear.weight", 1)))),
    )  # fmt: skip
