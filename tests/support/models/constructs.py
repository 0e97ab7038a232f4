"""Small modules, one construct each, and the groups that a tracer must find in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

OUTPUT = "feeds the model's output"


class Net(nn.Module):
    """Named parts and a function of the module and its inputs."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def chain(*parts: nn.Module) -> Net:
    """The parts one after another, named ``a``, ``b``, ``c`` ..."""

    def run(net: Net, x: Tensor) -> Tensor:
        for name in "abcdefgh"[: len(parts)]:
            x = getattr(net, name)(x)
        return x

    return Net(run, **dict(zip("abcdefgh", parts)))


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 6, 6)), generator=torch.Generator().manual_seed(1))


conv = nn.Conv2d


@dataclass(frozen=True)
class Case:
    """A module, its inputs, and the plan: units of each prunable group, a part of the reason of each locked one."""

    net: Callable[[], nn.Module]
    units: dict[str, int]
    locked: dict[str, str]
    inputs: tuple[Tensor, ...] = ()


def shuffled(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    n, c, h, w = x.shape
    return net.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2))


def written_into(x: Tensor) -> Tensor:
    """The first columns of wider zeros."""
    wide = torch.zeros(x.shape[0], 12, dtype=x.dtype)
    wide[:, :8] = x
    return wide


def space_to_depth(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def depth_to_space(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, c // 4, 2 * h, 2 * w)


def windows(x: Tensor) -> Tensor:
    b, h, w, c = x.shape
    return x.view(b, h // 3, 3, w // 3, 3, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, c)


def gated(net: Any, x: Tensor) -> Tensor:
    left, right = net.a(x).chunk(2, 1)
    return net.b(left * right.sigmoid())


def excited(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    return net.b(x * net.grow(net.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid())


def cbam_channels(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    mean, top = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    gate = net.grow(net.squeeze(mean).relu()) + net.grow(net.squeeze(top).relu())
    return net.b(x * gate.sigmoid())


def cbam_space(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    gate = net.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1))
    return net.b(x * gate.sigmoid())


def dense(net: Any, x: Tensor) -> Tensor:
    x = torch.cat([x, net.a(x)], 1)
    x = torch.cat([x, net.b(x)], 1)
    return net.c(x)


def twice(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    return net.c(net.b(net.b(x).relu()))


def parameters(*shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    return {f"w{i}": nn.Parameter(torch.randn(shape)) for i, shape in enumerate(shapes)}


def tied() -> Net:
    parts = {"a": nn.Embedding(9, 8), "b": nn.Linear(8, 8), "out": nn.Linear(8, 9, bias=False)}
    parts["out"].weight = parts["a"].weight
    return Net(lambda n, i: n.out(n.b(n.a(i)).relu()), **parts)


def se_parts() -> dict[str, nn.Module]:
    return {"a": conv(3, 8, 3), "squeeze": conv(8, 4, 1), "grow": conv(4, 8, 1), "b": conv(8, 5, 1)}


def classifier(*middle: nn.Module) -> Callable[[], Net]:
    return lambda: chain(conv(3, 8, 3), *middle, conv(8, 5, 3))


TEXT = torch.arange(12).view(3, 4) % 9
END = {"b": OUTPUT}
LAST = {"c": OUTPUT}
CASES: dict[str, Case] = {
    "1d": Case(lambda: chain(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 5, 3)), {"a": 8}, END, (image(2, 3, 9),)),
    "3d": Case(lambda: chain(nn.Conv3d(3, 8, 3), nn.Conv3d(8, 5, 3)), {"a": 8}, END, (image(2, 3, 5, 5, 5),)),
    "transposed 1d": Case(
        lambda: chain(nn.ConvTranspose1d(3, 8, 3), nn.ConvTranspose1d(8, 5, 3)), {"a": 8}, END, (image(2, 3, 9),)
    ),
    "transposed 2d": Case(
        lambda: chain(nn.ConvTranspose2d(3, 8, 3, stride=2), nn.ConvTranspose2d(8, 5, 3)), {"a": 8}, END
    ),
    "transposed 3d": Case(
        lambda: chain(nn.Conv3d(3, 8, 3), nn.ConvTranspose3d(8, 5, 3)), {"a": 8}, END, (image(2, 3, 4, 4, 4),)
    ),
    "grouped": Case(classifier(conv(8, 8, 1, groups=4)), {"a": 4}, LAST),
    "grouped, wider": Case(lambda: chain(conv(3, 8, 3), conv(8, 12, 3, groups=4), conv(12, 5, 1)), {"a": 4}, LAST),
    "grouped, transposed": Case(
        lambda: chain(conv(3, 8, 3), nn.ConvTranspose2d(8, 12, 3, groups=4), conv(12, 5, 1)), {"a": 4}, LAST
    ),
    "grouped, of the raw input": Case(
        lambda: chain(conv(4, 8, 3, groups=2), conv(8, 5, 1)), {}, {"a": "fixed width", **END}, (image(2, 4, 6, 6),)
    ),
    "depthwise": Case(classifier(conv(8, 8, 1, groups=8), nn.BatchNorm2d(8)), {"a": 8}, {"d": OUTPUT}),
    "depthwise, two out of one": Case(
        lambda: chain(conv(3, 8, 3), conv(8, 16, 3, groups=8), conv(16, 5, 1)), {"a": 8}, LAST
    ),
    "batch norm": Case(classifier(nn.BatchNorm2d(8), nn.ReLU(inplace=True)), {"a": 8}, {"d": OUTPUT}),
    "batch norm without weights": Case(classifier(nn.BatchNorm2d(8, affine=False)), {"a": 8}, LAST),
    "group norm": Case(classifier(nn.GroupNorm(4, 8)), {"a": 8}, LAST),
    "group norm without weights": Case(classifier(nn.GroupNorm(4, 8, affine=False)), {"a": 8}, LAST),
    "layer norm": Case(
        lambda: chain(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)),
        {"a": 8}, {"d": OUTPUT}, (image(4, 6),),
    ),
    "layer norm over everything": Case(classifier(nn.LayerNorm((8, 4, 4))), {"a": 8}, LAST),
    "layer norm beside the channels": Case(classifier(nn.LayerNorm((4, 4))), {"a": 8}, LAST),
    "layer norm without weights": Case(classifier(nn.LayerNorm((8, 4, 4), elementwise_affine=False)), {"a": 8}, LAST),
    "rms norm": Case(lambda: chain(nn.Linear(6, 8), nn.RMSNorm(8), nn.Linear(8, 3)), {"a": 8}, LAST, (image(4, 6),)),
    "instance norm": Case(classifier(nn.InstanceNorm2d(8)), {"a": 8}, LAST),
    "instance norm with weights": Case(
        classifier(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)), {"a": 8}, LAST
    ),
    "prelu": Case(classifier(nn.PReLU(8), nn.PReLU()), {"a": 8}, {"d": OUTPUT}),
    "embedding": Case(
        lambda: Net(lambda n, i: n.c(n.b(n.a(i).mean(1)).relu()), a=nn.Embedding(9, 8), b=nn.Linear(8, 6),
                    c=nn.Linear(6, 3)),
        {"a": 8, "b": 6}, LAST, (TEXT,),
    ),
    "embedding tied to the decoder": Case(tied, {"a": 8}, {"out": OUTPUT}, (TEXT,)),
    "layer scale": Case(
        lambda: Net(lambda n, x: n.b(n.a(x) * n.w0), a=conv(3, 8, 3), b=conv(8, 5, 1), **parameters((8, 1, 1))),
        {"a": 8}, END,
    ),
    "concatenation, dense": Case(
        lambda: Net(dense, a=conv(3, 4, 1), b=conv(7, 6, 1), c=conv(13, 5, 1)), {"a": 4, "b": 6}, LAST
    ),
    "concatenation, inception": Case(
        lambda: Net(lambda n, x: n.c(torch.cat([n.a(x), n.b(x), F.max_pool2d(x, 3, 1, 1)], 1)), a=conv(3, 4, 1),
                    b=conv(3, 6, 3, padding=1), c=conv(13, 5, 1)),
        {"a": 4, "b": 6}, LAST,
    ),
    "chunk": Case(lambda: Net(gated, a=conv(3, 8, 3), b=conv(4, 5, 1)), {"a": 4}, END),
    "split into fixed widths": Case(
        lambda: Net(lambda n, x: n.b(n.a(x).split((3, 5), 1)[1]), a=conv(3, 8, 3), b=conv(5, 5, 1)),
        {}, {"a": "fixed widths", "a#2": "fixed widths", **END},
    ),
    "split into pieces of a plain width": Case(
        lambda: Net(lambda n, x: n.b(torch.mul(*n.a(x).split(4, 1))), a=conv(3, 8, 3), b=conv(4, 5, 1)),
        {}, {"a": "fixed widths", **END},
    ),
    "split into halves by the shape": Case(
        lambda: Net(lambda n, x: n.b(torch.mul(*(y := n.a(x)).split(y.shape[1] // 2, 1))),
                    a=conv(3, 8, 3), b=conv(4, 5, 1)),
        {"a": 4}, END,
    ),
    "view by the size of other units": Case(
        lambda: Net(lambda n, x: (n.b(y := n.a(x)), n.d(n.c(x).view(len(x), y.shape[1]))),
                    a=nn.Linear(6, 8), b=nn.Linear(8, 3), c=nn.Linear(6, 8), d=nn.Linear(8, 3)),
        {}, {"a": "gives the size of other units", "c": "gives the size of other units", "b": OUTPUT, "d": OUTPUT},
        (image(4, 6),),
    ),
    "view by a plain number": Case(
        lambda: Net(lambda n, x: n.b(n.a(x).view(len(x), 1, 8)), a=nn.Linear(6, 8), b=nn.Linear(8, 3)),
        {}, {"a": "writes their number (8)", **END}, (image(4, 6),),
    ),
    "expanded by a plain number": Case(
        lambda: Net(lambda n, x: n.b(n.a(x)[:, None].expand(4, 2, 8).mean(1)), a=nn.Linear(6, 8), b=nn.Linear(8, 3)),
        {}, {"a": "writes their number (8)", **END}, (image(4, 6),),
    ),
    "expanded by -1": Case(
        lambda: Net(lambda n, x: n.b(n.a(x)[:, None].expand(4, 2, -1).mean(1)), a=nn.Linear(6, 8), b=nn.Linear(8, 3)),
        {"a": 8}, END, (image(4, 6),),
    ),
    "view by the size of the same units": Case(
        lambda: Net(lambda n, x: n.b(((y := n.a(x)) + n.c(x)).view(len(x), 1, y.shape[1])),
                    a=nn.Linear(6, 8), b=nn.Linear(8, 3), c=nn.Linear(6, 8)),
        {"a": 8}, END, (image(4, 6),),
    ),
    "narrow to halves by the shape": Case(
        lambda: Net(lambda n, x: n.b((y := n.a(x)).narrow(1, 0, y.shape[1] // 2)
                                     * y.narrow(1, y.shape[1] // 2, y.shape[1] // 2)),
                    a=conv(3, 8, 3), b=conv(4, 5, 1)),
        {"a": 4}, END,
    ),
    **{
        f"a table {name}": Case(
            partial(lambda cut: Net(lambda n, x: n.b(n.a(x) * cut(n, n.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 5),
                                    v=nn.Parameter(torch.randn(12))), cut),
            {"a": 8} if is_open else {}, END if is_open else {"a": "v is taken by fixed positions in", **END},
            (image(4, 6),),
        )
        for name, is_open, cut in [
            ("cut by the shape", True, lambda n, y: n.v[: y.shape[1]]),
            ("without its first entries", True, lambda n, y: n.v[4:]),
            ("cut at a number", False, lambda n, y: n.v[:8]),
            ("cut at two numbers", False, lambda n, y: n.v[2:10]),
            ("counted from its end", False, lambda n, y: n.v[-8:]),
            ("narrowed to a number", False, lambda n, y: n.v.narrow(0, 0, 8)),
            ("split at a number", False, lambda n, y: n.v.split((8, 4))[0]),
        ]
    },
    "slice": Case(
        lambda: Net(lambda n, x: n.b(n.a(x)[:, 2:7]), a=conv(3, 8, 3), b=conv(5, 5, 1)),
        {}, {"a": "fixed positions (slice)", "a#2": "fixed positions (slice)", **END},
    ),
    "flatten": Case(
        lambda: chain(conv(3, 8, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)), {"a": 8}, {"d": OUTPUT}
    ),
    "view into an image, by -1": Case(
        lambda: Net(lambda n, x: n.b(n.a(x).view(len(x), -1, 2, 2)), a=nn.Linear(6, 32), b=nn.ConvTranspose2d(8, 5, 2)),
        {"a": 8}, END, (image(4, 6),),
    ),
    "view into an image, nn.Unflatten": Case(
        lambda: chain(nn.Linear(6, 32), nn.Unflatten(1, (8, 2, 2)), conv(8, 5, 1)), {"a": 8}, LAST, (image(4, 6),)
    ),
    "view into an image, by a number": Case(
        lambda: Net(lambda n, x: n.b(n.a(x).view(-1, 8, 2, 2)), a=nn.Linear(6, 32), b=conv(8, 5, 1)),
        {}, {"a": "writes their number", **END}, (image(4, 6),),
    ),
    "space to depth": Case(
        lambda: Net(lambda n, x: n.b(space_to_depth(n.a(x))), a=conv(3, 8, 1), b=conv(32, 5, 1)), {"a": 8}, END
    ),
    "depth to space": Case(
        lambda: Net(lambda n, x: n.b(depth_to_space(n.a(x))), a=conv(3, 32, 1), b=conv(8, 5, 1)), {"a": 8}, END
    ),
    "windows": Case(
        lambda: Net(lambda n, x: n.b(windows(n.a(x))), a=nn.Linear(3, 8), b=nn.Linear(8, 5)), {"a": 8}, END,
        (image(2, 6, 6, 3),),
    ),
    "squeeze and excitation": Case(lambda: Net(excited, **se_parts()), {"a": 8, "squeeze": 4}, END),
    "channel attention": Case(lambda: Net(cbam_channels, **se_parts()), {"a": 8, "squeeze": 4}, END),
    "spatial attention": Case(
        lambda: Net(cbam_space, a=conv(3, 8, 3), gate=conv(2, 1, 1), b=conv(8, 5, 1)),
        {}, {"a": "is mixed by", "gate": "is broadcast", **END},
    ),
    "channel shuffle": Case(lambda: Net(shuffled, a=conv(3, 8, 3), b=conv(8, 5, 1)), {"a": 4}, END),
    "pixel shuffle": Case(
        lambda: chain(conv(3, 16, 3), nn.PixelShuffle(2), conv(4, 5, 1)), {"a": 4}, LAST
    ),
    "upsampling": Case(classifier(nn.Upsample(scale_factor=2, mode="bilinear")), {"a": 8}, LAST),
    "residual": Case(
        lambda: Net(lambda n, x: n.c((y := n.a(x)) + n.b(y)), a=conv(3, 8, 3), b=conv(8, 8, 1), c=conv(8, 5, 1)),
        {"a": 8}, LAST,
    ),
    "residual of the raw input": Case(
        lambda: Net(lambda n, x: n.b(x + n.a(x)), a=conv(3, 3, 1), b=conv(3, 5, 1)), {}, {"a": "fixed width", **END}
    ),
    "padded shortcut": Case(
        lambda: Net(lambda n, x: n.c(F.pad((y := n.a(x)), (0, 0, 0, 0, 1, 3)) + n.b(y)), a=conv(3, 4, 3),
                    b=conv(4, 8, 1), c=conv(8, 5, 1)),
        {"a": 4}, {"b": "fixed width", **LAST},  # each unit of a takes one of b along, the padding stays as wide
    ),
    "weight norm": Case(
        lambda: chain(conv(3, 8, 3), weight_norm(conv(8, 6, 1)), weight_norm(conv(6, 5, 1))), {"a": 8, "b": 6}, LAST
    ),
    "shared layer": Case(lambda: Net(twice, a=conv(3, 8, 3), b=conv(8, 8, 1), c=conv(8, 5, 1)), {"a": 8}, LAST),
    "bare kernels": Case(
        lambda: Net(lambda n, x: F.conv2d(F.conv2d(x, n.w0, n.w1).relu(), n.w2),
                    **parameters((8, 3, 3, 3), (8,), (5, 8, 1, 1))),
        {"w0": 8}, {"w2": OUTPUT},
    ),
    "written into a part": Case(
        lambda: Net(lambda n, x: n.b(written_into(n.a(x))), a=nn.Linear(6, 8), b=nn.Linear(12, 3)),
        {}, {"a": "fixed width", **END}, (image(4, 6),),
    ),
    "product of activations": Case(
        lambda: Net(lambda n, x: n.a(x) @ n.b(x).transpose(1, 2), a=nn.Linear(6, 8), b=nn.Linear(6, 8)),
        {"a": 8}, {}, (image(2, 4, 6),),
    ),
    "sorted channels": Case(
        lambda: Net(lambda n, x: n.b(n.a(x).sort(1).values), a=conv(3, 8, 3), b=conv(8, 5, 1)),
        {}, {"a": "is mixed by", **END},
    ),
    "softmax over channels": Case(
        lambda: Net(lambda n, x: n.b(n.a(x).softmax(1)), a=conv(3, 8, 3), b=conv(8, 5, 1)),
        {}, {"a": "is mixed by", **END},
    ),
    "operator of no rule": Case(
        lambda: Net(lambda n, x: n.b(torch.fft.rfft(n.a(x)).abs()), a=nn.Linear(6, 8), b=nn.Linear(5, 3)),
        {}, {"a": "is mixed by", **END}, (image(4, 6),),
    ),
}  # fmt: skip
