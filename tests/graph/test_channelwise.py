"""Operators that work on each channel by itself: the channels before them can be removed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.ops as vision
from torch import Tensor, nn

import etp_graph as etp
from tests.support.models.constructs import Net

Run = Callable[[Tensor], Tensor]


def grid(x: Tensor) -> Tensor:
    turn = torch.tensor([[0.8, 0.2, 0.0], [-0.2, 0.8, 0.1]], dtype=x.dtype)
    return F.affine_grid(turn[None].repeat(x.shape[0], 1, 1), list(x.size()), align_corners=False)


def unpooled(x: Tensor) -> Tensor:
    return F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)


def patches(x: Tensor) -> Tensor:
    b, _, h, w = x.shape
    return F.unfold(x, 3, padding=1).view(b, -1, 9, h * w).mean(2).view(b, -1, h, w)


def folded(x: Tensor) -> Tensor:
    return F.fold(F.unfold(x, 3, padding=1), x.shape[-2:], 3, padding=1)


def boxes(x: Tensor) -> list[Tensor]:
    return [torch.tensor([[0.0, 0.0, 4.0, 4.0]], dtype=x.dtype)] * x.shape[0]


def written(x: Tensor, index: Any, value: Any) -> Tensor:
    x = x.clone()
    x[index] = value
    return x


def reshaped_in_place(x: Tensor) -> Tensor:
    return x.clone().unsqueeze_(1).transpose_(1, 2).squeeze_(2)


def new_part(x: Tensor, make: Callable[..., Tensor]) -> Tensor:
    b, c, _, w = x.shape
    return torch.cat([x, make(b, c, 1, w)], 2)


def rows_at_positions(x: Tensor) -> Tensor:
    rows = x.flatten(2).mT
    return written(rows, (slice(None), [0, 3]), 2 * rows[:, [1, 2]]).mT[..., None]


DIAGONAL = torch.eye(6, dtype=torch.bool)[None].expand(2, 6, 6)

KEPT: dict[str, Run] = {
    "grid_sample": lambda x: F.grid_sample(x, grid(x), align_corners=False),
    "max_unpool": unpooled,
    "pad, negative": lambda x: F.pad(x, (-1, -1, -2, 1)),
    "pad, reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "unfold": patches,
    "fold": folded,
    "Tensor.unfold": lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)),
    "roi_align": lambda x: vision.roi_align(x, boxes(x), 2),
    "roi_pool": lambda x: vision.roi_pool(x, boxes(x), 2),
    "rot90": lambda x: torch.rot90(x, 1, (2, 3)),
    "rot90, channels turned too": lambda x: torch.rot90(x, 2, (2, 3)).flip(1),
    "sort": lambda x: x.sort(-1)[0],
    "sort, default dimension": lambda x: x.sort(stable=True)[0],
    "cumsum": lambda x: x.cumsum(2),
    "cumsum, in place": lambda x: x.clone().cumsum_(3),
    "cummax": lambda x: x.cummax(2).values,
    "fft over space": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=x.shape[-2:]),
    "fft, complex": lambda x: torch.fft.ifft(torch.fft.fft(x, dim=2), dim=2).real,
    "triu": lambda x: x.triu(),
    "diagonal": lambda x: x.diagonal(dim1=2, dim2=3)[..., None],
    "kthvalue": lambda x: x * x.flatten(2).kthvalue(3)[0][:, :, None, None],
    "mode": lambda x: x * x.flatten(2).mode()[0][:, :, None, None],
    "quantile": lambda x: x * x.flatten(2).quantile(0.3, -1)[:, :, None, None],
    "median": lambda x: x * x.median(-1, keepdim=True).values,
    "mask by itself": lambda x: written(x, x < 0, 0.0),
    "mask of positions": lambda x: written(x.movedim(1, -1), DIAGONAL, 0.5).movedim(-1, 1),
    "a number at a position": lambda x: written(x, (slice(None), slice(None), 0), 0.5),
    "a part of itself": lambda x: written(x, (slice(None), slice(None), slice(1, None)), x[:, :, :-1] * 2),
    "rows at positions": rows_at_positions,
    "shape changed in place": reshaped_in_place,
    "new_zeros of the shape": lambda x: x + x.new_zeros(x.shape),
    "new_full of sizes": lambda x: new_part(x, lambda *s: x.new_full(s, 0.5)),
    "zeros of sizes": lambda x: new_part(x, lambda *s: torch.zeros(s, dtype=x.dtype)),
    "random of the size": lambda x: x + torch.rand(x.size(), dtype=x.dtype),
    "complex numbers": lambda x: torch.view_as_real(torch.polar(x.abs(), x)).sum(-1),
}  # fmt: skip


def check(run: Run, width: int, units: int) -> None:
    torch.manual_seed(0)
    parts = {"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(width, 4, 1)}
    model, x = Net(lambda n, x: n.b(run(n.a(x))), **parts), torch.randn(2, 3, 6, 6)
    plan = etp.trace(model, x, check=False)
    assert [(group.name, group.n_units) for group in plan.prunable] == [("a", units)]
    found = etp.verify(model, plan, x)
    assert found.error < 1e-10
    assert found.effect > 1e-3


@pytest.mark.parametrize("name", KEPT)
def test_channels_before_an_operator_can_be_removed(name: str) -> None:
    check(KEPT[name], 8, 8)


TIED: dict[str, tuple[Run, int]] = {"glu": (lambda x: F.glu(x, 1), 4), "glu, module": (nn.GLU(1), 4)}


@pytest.mark.parametrize("name", TIED)
def test_channels_that_an_operator_combines_go_together(name: str) -> None:
    check(*TIED[name], 4)


MIXED: dict[str, Run] = {
    "sort": lambda x: x.sort(1)[0],
    "cumsum": lambda x: x.cumsum(1),
    "fft": lambda x: torch.fft.fft(x, dim=1).abs(),
    "triu": lambda x: x.movedim(1, -1).triu().movedim(-1, 1),
    "Tensor.unfold": lambda x: x.unfold(1, 4, 4).flatten(3).permute(0, 1, 3, 2)[..., :6].repeat(1, 4, 1, 1),
    "mask across channels": lambda x: written(x, (slice(None), torch.arange(8) < 4), 0.0),
    "masked_scatter": lambda x: x.masked_scatter((torch.arange(8) < 4)[:, None, None].expand_as(x), x * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_channels_that_an_operator_mixes_are_locked_without_the_check(name: str) -> None:
    torch.manual_seed(0)
    parts = {"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(8, 4, 1), "c": nn.Linear(6, 5), "d": nn.Linear(5, 2)}
    model = Net(lambda n, x: (n.b(MIXED[name](n.a(x))), n.d(n.c(x))), **parts)
    plan = etp.trace(model, torch.randn(2, 3, 6, 6), check=False)
    assert [group.name for group in plan.prunable] == ["c"]


def test_text_and_image_tokens_in_one_sequence() -> None:
    def run(n: Any, ids: Tensor, image: Tensor) -> Tensor:
        h = n.e(ids)
        h = h.masked_scatter((ids == 7)[..., None].expand_as(h), n.v(image))
        return n.f(h + n.down(n.up(h).relu()))

    torch.manual_seed(0)
    parts = {"e": nn.Embedding(20, 16), "v": nn.Linear(5, 16), "up": nn.Linear(16, 24), "down": nn.Linear(24, 16)}
    model, ids = Net(run, **parts, f=nn.Linear(16, 3)), torch.tensor([[1, 7, 7, 3], [7, 2, 7, 4]])
    plan = etp.trace(model, (ids, torch.randn(4, 5)), prune="all", check=False)
    assert {group.name: group.n_units for group in plan.prunable} == {"e": 16, "up": 24}
    assert etp.verify(model, plan, (ids, torch.randn(4, 5))).error < 1e-10


@pytest.mark.parametrize("index", [lambda m: m, lambda m: (m, slice(None))])
def test_positions_by_a_mask_with_two_dimensions(index: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    model = Net(lambda n, x: n.b(n.a(x)[index(x[..., 0] > 0)]), a=nn.Linear(3, 8), b=nn.Linear(8, 4))
    x = torch.randn(2, 5, 3)
    plan = etp.trace(model, x, check=False)
    assert [group.name for group in plan.prunable] == ["a"]
    assert etp.verify(model, plan, x).error < 1e-10


def test_a_table_padded_along_one_of_two_axes() -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        table = F.pad(n.w0, [0, 0, 2, 2, 0, 0])
        return n.b(n.a(x) + table[0, 1])

    model = Net(run, a=nn.Linear(5, 16), w0=nn.Parameter(torch.randn(1, 5, 16)), b=nn.Linear(16, 3),
                c=nn.Linear(3, 6), d=nn.Linear(6, 2))  # fmt: skip
    inner = model.run
    model.run = lambda n, x: n.d(n.c(inner(n, x)).relu())
    x = torch.randn(2, 7, 5)
    plan = etp.trace(model, x)
    assert "c" in [group.name for group in plan.prunable]
    etp.verify(model, plan, x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("modulated", [True, False])
def test_deformable_convolutions(bias: bool, modulated: bool) -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        x = n.a(x).relu()
        return n.b(n.d(x, n.offset(x), n.gate(x).sigmoid() if modulated else None).relu())

    torch.manual_seed(0)
    parts = {"a": nn.Conv2d(3, 8, 1), "offset": nn.Conv2d(8, 18, 1), "gate": nn.Conv2d(8, 9, 1)}
    model = Net(run, **parts, d=vision.DeformConv2d(8, 6, 3, padding=1, bias=bias), b=nn.Conv2d(6, 4, 1))
    x = torch.randn(2, 3, 6, 6)
    plan = etp.trace(model, x, check=False)
    assert {group.name: group.n_units for group in plan.prunable} == {"a": 8, "d": 6}
    assert etp.verify(model, plan, x).error < 1e-10
