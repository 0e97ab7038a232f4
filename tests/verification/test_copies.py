"""The copies that the check runs on: their weights, what a trial leaves of them, and where gradients count."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.verification import Masked, randomize_
from etp_graph.verification._copies import _copy_in
from etp_graph.verification._sampling import _LARGE, _STORED
from etp_graph.verification._trials import Trials, _compare_finite, _compare_kept
from tests.support.models.constructs import Net
from tests.support.models.toy import Toy, toy_plan
from tests.verification.test_comparable import OwnDerivative

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net(run: Any, units: int = 8) -> Net:
    torch.manual_seed(0)
    return Net(run, a=nn.Linear(6, units), b=nn.Linear(units, 5))


def values_of(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_trial_leaves_the_weights_of_the_copy(dtype: torch.dtype, gradients: bool) -> None:
    judge = Trials(Toy(), toy_plan(), X, gradients=gradients, randomize=True, seed=0, dtypes=(dtype,))
    before = values_of(judge.model)
    for ratio in (0.0, 0.5, 1.0):
        assert judge.trial(judge.plan.prunable, ratio).good
        after = values_of(judge.model)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_trials_of_one_selection_agree_whatever_ran_before() -> None:
    first, second = (
        Trials(Toy(), toy_plan(), X, gradients=False, randomize=True, seed=0, dtypes=(torch.float64,)) for _ in "ab"
    )
    first.trial(first.plan.prunable, 1.0)
    assert first.trial(first.plan.prunable, 0.5) == second.trial(second.plan.prunable, 0.5)


@pytest.mark.parametrize(
    ("dtype", "effect", "differ"),
    [(torch.float64, True, True), (torch.float32, False, True), (torch.float32, True, False)],
)
def test_each_trial_has_the_weights_of_its_seed(dtype: torch.dtype, effect: bool, differ: bool) -> None:
    """A judge in float32 keeps one set, because rounding of some sets exceeds its tolerance."""
    judge = Trials(
        Toy(), toy_plan(), X, gradients=False, randomize=True, seed=0, dtypes=(dtype,), effect=effect,
        seeds={0.5: 0, 0.0: 1},
    )  # fmt: skip
    found = []
    for ratio in (0.5, 0.0, 0.5, 0.0):
        assert judge.trial(judge.plan.prunable, ratio).good
        found.append(values_of(judge.model))
    for a, b, c, d in zip(*found, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
        assert torch.equal(a, b) != (differ and a.is_floating_point())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("filled", [False, True])
def test_a_copy_shares_no_memory_with_the_model(dtype: torch.dtype, filled: bool) -> None:
    model = Toy()
    made = _copy_in(model, dtype, filled=filled)
    mine = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert not mine & {tensor.untyped_storage().data_ptr() for tensor in (*made.parameters(), *made.buffers())}
    assert {parameter.dtype for parameter in made.parameters()} == {dtype}
    if filled:
        assert all(torch.equal(a.to(dtype), b) for a, b in zip(model.parameters(), made.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(300, 1000), (64, 64, 3, 3), (3, _STORED), (2, 2 * _STORED), (9, _STORED - 1)])
def test_no_two_rows_of_a_large_matrix_are_equal(shape: tuple[int, ...]) -> None:
    layers = [nn.ParameterDict({"weight": nn.Parameter(torch.empty(shape))}) for _ in "ab"]
    first, second = (layer["weight"].detach() for layer in layers)
    assert first.numel() >= _LARGE
    randomize_(nn.ModuleList(layers))
    rows = first.flatten(1)
    assert len(rows.unique(dim=0)) == len(rows) or rows.shape[1] == 1
    if rows.shape[1] < _STORED:
        assert len(rows.T.unique(dim=0)) == rows.shape[1]
    assert not torch.equal(first, second)
    fan_in = rows.shape[1]
    assert abs(float(rows.std()) * fan_in**0.5 - 1) < 0.05
    assert abs(float(rows.mean()) * fan_in**0.5) < 0.05


def test_random_values_do_not_depend_on_memory_layout_and_precision() -> None:
    plain, last = nn.Conv2d(64, 96, 3), nn.Conv2d(64, 96, 3).to(memory_format=torch.channels_last)
    wide = nn.Conv2d(64, 96, 3).double()
    for layer in (plain, last, wide):
        randomize_(layer, seed=3)
    assert torch.equal(plain.weight, last.weight)
    randomize_(last, seed=4)
    assert not torch.equal(plain.weight, last.weight)
    assert torch.allclose(plain.weight.double(), wide.weight, rtol=1e-6)


@pytest.mark.parametrize("finite", [False, True])
def test_removed_units_are_zero_along_all_axes(finite: bool) -> None:
    model, plan = Toy(), toy_plan()
    keep = torch.rand(plan.n_units, generator=torch.Generator().manual_seed(0)) < 0.5
    dense = values_of(model)
    Masked(model, plan, keep, finite=finite)
    other = Toy()
    other.load_state_dict({name: value for (name, _), value in zip(_named(model), dense, strict=True)})
    Masked(other, plan, keep)
    assert all(torch.equal(a, b) for a, b in zip(values_of(model), values_of(other), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(values_of(model), dense, strict=True))


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def test_weights_that_are_not_finite_are_masked_as_well() -> None:
    model, x = net(lambda n, x: n.b(n.a(x).relu())), torch.randn(4, 6)
    with torch.no_grad():
        model.b.weight[2, 3] = float("inf")
    plan = etp.trace(model, x)
    found = etp.verify(model, plan, x, randomize=False, gradients=False)
    assert found.error < 1e-12
    assert found.effect > 0


def test_float32_that_gives_nan_hides_no_error() -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        y = n.a(x)
        return n.b(y / y.stride(0)) + (float("nan") if x.dtype == torch.float32 else 0.0)

    model, x = net(run), torch.randn(4, 6)
    with pytest.raises(etp.PlanError, match="check failed"):
        etp.trace(model, x)


def test_an_operator_without_float32_is_judged_in_float64() -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        y = n.a(x)
        if y.dtype == torch.float32 and not torch.is_grad_enabled() and y.stride(0) != 8:
            raise RuntimeError("no kernel for Float")
        return n.b(y)

    model, x = net(run), torch.randn(4, 6)
    assert [group.name for group in etp.trace(model, x).prunable] == ["a"]


@pytest.mark.parametrize("ratio", [0.0, 1.0, (0.0, 1.0), (0.0, 0.3), (0.7, 0.3)])
def test_gradients_are_compared_at_any_ratios(ratio: Any) -> None:
    """Wrong gradients are found and explained, so they were compared."""
    model, x = net(lambda n, x: n.b(OwnDerivative.apply(n.a(x)))), torch.randn(4, 6)
    plan = etp.trace(model, x)
    assert "differ from finite differences" in etp.verify(model, plan, x, ratio=ratio).note
    right = net(lambda n, x: n.b(n.a(x)))
    assert etp.verify(right, plan, x, ratio=ratio).gradient_error is not None


@pytest.mark.parametrize(("where", "passes"), [("narrow", False), ("wide", True), ("both", True)])
def test_gradients_that_surgery_makes_nan_are_an_error(where: str, passes: bool) -> None:
    """Where masking makes them, as in the norm of a unit that is zero, there is nothing to compare."""

    def run(n: nn.Module, x: Tensor) -> Tensor:
        hidden = n.a(x)
        is_wide = hidden.shape[1] == wide
        undefined = where == "both" or is_wide == (where == "wide")
        return n.b(hidden + (hidden * 0).sum().sqrt() if undefined else hidden)  # the square root has no slope at 0

    model, x = net(run), torch.randn(4, 6)
    wide = model.a.out_features
    plan = etp.trace(net(lambda n, x: n.b(n.a(x))), x)  # tracing this one would lock what its size decides
    with nullcontext() if passes else pytest.raises(etp.EquivalenceError):
        etp.verify(model, plan, x, ratio=0.3)


@pytest.mark.parametrize("sparse", [False, True])
def test_entries_that_are_finite_with_masks_are_compared(sparse: bool) -> None:
    mine, other = torch.ones(3, 2), torch.ones(3, 2)
    other[0, 0], mine[1, 1] = torch.nan, 1.5
    kept = {0: torch.arange(3)}
    assert _compare_finite(*(t.to_sparse() if sparse else t for t in (mine, other)), kept) == (0.5, 1.0)
    mine[2, 0] = torch.nan
    assert _compare_finite(*(t.to_sparse() if sparse else t for t in (mine, other)), kept)[0] == float("inf")


@pytest.mark.parametrize("shape", [(2**11, 700), (700, 2**11), (5,), ()])
def test_gradients_are_compared_in_pieces_as_in_one(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(shape, generator=generator, dtype=torch.float64)
    kept = {axis: (torch.rand(size, generator=generator) < 0.8).nonzero().flatten() for axis, size in enumerate(shape)}
    part = other
    for axis, index in kept.items():
        part = part.index_select(axis, index)
    grad = part.clone()
    assert _compare_kept(grad, other, kept) == (0.0, float(part.abs().max()))
    grad.view(-1)[-1] += 1e-3
    difference, _ = _compare_kept(grad, other, kept)
    assert difference == pytest.approx(1e-3)
