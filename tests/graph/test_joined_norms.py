"""Group norms over channels of several layers: all normalisation groups keep equally many channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import etp_graph as etp
from tests.support.models.constructs import Net, conv, image


def norm(channels: int, groups: int) -> nn.GroupNorm:
    made = nn.GroupNorm(groups, channels)
    for parameter in made.parameters():
        nn.init.normal_(parameter, 1.0)
    return made


def joined(*widths: int, groups: int) -> Net:
    """Layers of these widths, a norm over all of their channels, and a layer that reads them."""
    names = [f"a{i}" for i in range(len(widths))]
    layers = {name: conv(3, width, 1) for name, width in zip(names, widths, strict=True)}

    def run(n: Any, x: Tensor) -> Tensor:
        found: Tensor = n.last(n.norm(torch.cat([getattr(n, name)(x) for name in names], 1)).relu())
        return found

    return Net(run, **layers, norm=norm(sum(widths), groups), last=conv(sum(widths), 2, 1))


class UNet(nn.Module):
    """Two levels whose skips are joined to the trunk. Every norm sees other parts of them."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.down_norm, self.low = conv(3, 16, 3, padding=1), norm(16, 8), conv(16, 24, 3, 2, 1)
        self.mid, self.mid_norm = conv(24, 24, 3, padding=1), norm(24, 4)
        self.up_norm, self.up = norm(48, 8), conv(48, 8, 3, padding=1)
        self.out_norm, self.out = norm(24, 4), conv(24, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down_norm(self.down(x)).relu()
        low = self.low(skip)
        low = low + self.mid(self.mid_norm(low).relu())
        both = torch.cat([low, self.mid(low)], 1)
        up = F.interpolate(self.up(self.up_norm(both).relu()), scale_factor=2.0)
        out: Tensor = self.out(self.out_norm(torch.cat([up, skip], 1)).relu())
        return out


def twice() -> Net:
    """The same units in both halves, which residual blocks also normalise alone."""

    def run(n: Any, x: Tensor) -> Tensor:
        a = n.alone(n.a(x)).relu()
        found: Tensor = n.last(n.norm(torch.cat([a, a + n.b(a)], 1)))
        return found

    return Net(run, a=conv(3, 32, 1), b=conv(32, 32, 1), alone=norm(32, 8), norm=norm(64, 8), last=conv(64, 2, 1))


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (lambda: joined(6, 2, groups=4), {"a0": 4}),
        (lambda: joined(6, 10, groups=4), {"a0": 8}),
        (lambda: joined(8, 16, 24, groups=3), {"a0": 6}),
        (lambda: joined(12, 12, groups=2), {"a0": 2}),
        (twice, {"a": 8}),
        (UNet, {"down": 12}),
    ],
)
def test_parts_of_a_norm_are_one_group_of_equal_blocks(make: Callable[[], nn.Module], blocks: dict[str, int]) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), image(2, 3, 8, 8)
    plan = etp.trace(model, x, check=False)
    assert {name: plan[name].blocks for name in blocks} == blocks
    assert all(plan[name].locked is None for name in blocks)
    for ratio in (0.3, 0.5):
        found = etp.verify(model, plan, x, ratio=ratio)
        assert found.error < 1e-10
        assert found.effect > 1e-3


@pytest.mark.parametrize(
    ("widths", "groups"), [((5, 3), 4), ((7, 9), 4), ((4, 4), 8)], ids=["odd", "odd, wide", "a channel each"]
)
def test_parts_that_share_no_blocks_stay(widths: tuple[int, ...], groups: int) -> None:
    model, x = joined(*widths, groups=groups), image()
    model.extra, run = nn.Sequential(conv(3, 4, 1), conv(4, 2, 1)), model.run
    model.run = lambda n, x: (run(n, x), n.extra(x))
    plan = etp.trace(model, x, check=False)
    assert [group.name for group in plan.prunable] == ["extra.0"]
    assert "normalisation groups" in str(plan["a0"].locked)
    assert etp.verify(model, plan, x).error < 1e-10


def test_units_in_another_order_than_their_groups_stay() -> None:
    model = Net(lambda n, x: n.last(n.norm(F.channel_shuffle(n.a(x), 2))), a=conv(3, 8, 1), norm=norm(8, 4),
                last=conv(8, 2, 1))  # fmt: skip
    with pytest.raises(etp.PlanError, match="normalisation groups"):
        etp.trace(model, image(), check=False)
