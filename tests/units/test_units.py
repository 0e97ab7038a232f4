"""Gathering from and scattering to units, against loops over positions."""

from __future__ import annotations

import pytest
import torch

from etp_graph.plan import as_tensor, numbers_per_unit, with_no_unit
from etp_graph.units import Rankings, Units
from etp_graph.units import _kernels as kernels
from etp_graph.units._kernels import axis_sums
from tests.support.models.toy import Toy, toy_plan


@pytest.mark.parametrize("shape", [(5,), (4, 3), (4, 3, 2, 2), (4, 3, 5), (64, 40)])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1 << 20, 16])
def test_axis_sums_are_sums(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_CHUNK", chunk)
    torch.manual_seed(0)
    value = torch.randn(shape, dtype=torch.float64).to(dtype)
    if layout == "strided":
        value = value.flip(0).transpose(0, -1).contiguous().transpose(0, -1)
    wide = value.double()
    for over in [[0], *([[1], [0, 1], [1, 0]] if len(shape) > 1 else []), *([[2]] if len(shape) > 2 else [])]:
        for transform in (None, torch.square):
            full = wide if transform is None else transform(wide)
            wanted = [full.sum([d for d in range(full.ndim) if d != a]) if full.ndim > 1 else full for a in over]
            for found, right in zip(axis_sums(value, over, transform), wanted, strict=True):
                assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)


def test_axis_sums_are_differentiable() -> None:
    value = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: tuple(axis_sums(v, [0, 1], torch.square)), (value,))


def test_reduce_and_positions_agree_with_the_plan() -> None:
    model, plan = Toy().double(), toy_plan()
    units = Units(model, plan)
    parameters = dict(model.named_parameters())
    wanted = torch.zeros(plan.n_units, dtype=torch.float64)
    count = torch.zeros(plan.n_units)
    for group, span in plan.spans():
        for piece in group.slices:
            for i, u in zip(as_tensor(piece.index), as_tensor(piece.unit), strict=True):
                if piece.tensor in parameters:
                    part = parameters[piece.tensor].detach().select(piece.axis, int(i))
                    wanted[span.start + int(u)] += part.square().sum()
                    count[span.start + int(u)] += part.numel()
    torch.testing.assert_close(units.square_norms(model).detach(), wanted)
    assert torch.equal(numbers_per_unit(plan), count)
    pairs = reversed([(name, p.detach().square()) for name, p in units.tensors(model).items()])
    torch.testing.assert_close(units.reduce(pairs), wanted)  # in any order, made one at a time
    parts = units.positions(with_no_unit(torch.arange(plan.n_units), -1))
    found = [(axis, values.tolist()) for axis, values in parts["conv2.weight"]]
    assert found == [(1, list(range(8))), (0, list(range(8, 14)))]


def test_a_subset_of_tensors_counts_for_its_units_only() -> None:
    model, plan = Toy(), toy_plan()
    found = Units(model, plan).reduce({"norm.weight": torch.full((8,), 2.0)})
    assert found.tolist() == [2.0] * 8 + [0.0] * 11


def test_ranks_within_runs() -> None:
    plan = toy_plan()
    runs = Rankings.of(plan)
    key = torch.randn(plan.n_units, generator=torch.Generator().manual_seed(0))
    rank, relative = runs.rank(key), runs.relative(key)
    filled = runs.raise_zeros(torch.where(key > 0, key, 0.0))
    for _, span in plan.spans():
        own = key[span]
        assert rank[span].tolist() == own.argsort().argsort().tolist()
        assert runs.distance(rank)[span].max() == relative[span].max() == 1
        torch.testing.assert_close(relative[span], (own - own.min()) / (own.max() - own.min()))
        torch.testing.assert_close(filled[span], own.where(own > 0, own[own > 0].min()))
    assert runs.relative(torch.ones(plan.n_units)).tolist() == [1.0] * plan.n_units
    assert runs.raise_zeros(torch.zeros(plan.n_units)).tolist() == [1.0] * plan.n_units
    assert runs.rank(torch.zeros(plan.n_units))[:8].tolist() == list(range(8))  # ties keep their places
