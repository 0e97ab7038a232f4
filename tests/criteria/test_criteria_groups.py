"""Criteria on plans made by hand; those that compare units against their definitions written out as loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from etp_graph import criteria
from etp_graph.errors import ScoreError
from etp_graph.plan import Group, Plan, Slice


def one_conv() -> tuple[nn.Module, Plan]:
    """A convolution whose filters are the units of one group."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 7, 3, bias=False)).double()
    piece = Slice(tensor="0.weight", axis=0, index=range(7), unit=range(7))
    group = Group(name="0", kind="channels", n_units=7, slices=(piece,))
    return model, Plan(groups=(group,), tensors={"0.weight": (7, 3, 3, 3)}, parameters=("0.weight",))


def filters(model: nn.Module) -> list[Tensor]:
    return [f.detach().flatten() for f in model[0].weight]  # type: ignore[index]


def naive_fpgm(w: list[Tensor], u: int) -> float:
    return sum(float((w[u] - other).norm()) for other in w)


def naive_whc(w: list[Tensor], u: int) -> float:
    cosines = [abs(float(torch.cosine_similarity(w[u], other, dim=0))) for other in w]
    return float(w[u].norm()) * sum(
        float(other.norm()) * (1 - cosines[v]) for v, other in enumerate(w) if v != u
    )  # fmt: skip


def naive_lamp(w: list[Tensor], u: int) -> float:
    own = float(w[u].square().sum())
    return own / sum(s for s in (float(other.square().sum()) for other in w) if s >= own)


NAIVE: dict[str, Callable[[list[Tensor], int], float]] = {"fpgm": naive_fpgm, "whc": naive_whc, "lamp": naive_lamp}
each = pytest.mark.parametrize("name", NAIVE)


def score(name: str, model: nn.Module, plan: Plan) -> Tensor:
    return getattr(criteria, name)(model, plan, **({} if name == "lamp" else {"normalize": "none"}))  # type: ignore


@each
def test_the_definition(name: str) -> None:
    model, plan = one_conv()
    wanted = [NAIVE[name](filters(model), u) for u in range(7)]
    torch.testing.assert_close(score(name, model, plan), torch.tensor(wanted, dtype=torch.float64))


@each
def test_slices_of_any_layout_are_one_vector(name: str) -> None:
    """The same numbers, split over two tensors, of which one holds two positions of a unit."""
    model, plan = one_conv()
    w = model[0].weight.detach().flatten(1)  # type: ignore[index]
    split = nn.Module()
    split.a = nn.Parameter(w[:, :25].clone())
    split.b = nn.Parameter(w[:, 25:].flatten().clone())
    pieces = (
        Slice(tensor="a", axis=0, index=range(7), unit=range(7)),
        Slice(tensor="b", axis=0, index=range(14), unit=torch.arange(7).repeat_interleave(2)),
    )
    parts = Plan(
        groups=(replace(plan.groups[0], slices=pieces),), tensors={"a": (7, 25), "b": (14,)}, parameters=("a", "b")
    )  # fmt: skip
    torch.testing.assert_close(score(name, split, parts), score(name, model, plan))


@each
def test_zeros_and_equals_are_worth_least(name: str) -> None:
    model, plan = one_conv()
    with torch.no_grad():
        model[0].weight[3] = 0  # type: ignore[index]
    found = score(name, model, plan)
    assert name == "fpgm" or found[3] == found.min() == 0
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight[:1].expand(7, -1, -1, -1).clone())  # type: ignore[index]
    wanted = 1 / 7 if name == "lamp" else 0.0
    torch.testing.assert_close(
        score(name, model, plan), torch.full((7,), wanted, dtype=torch.float64), atol=1e-6, rtol=0
    )
    nn.init.zeros_(model[0].weight)  # type: ignore[index]
    assert score(name, model, plan).tolist() == [0.0] * 7


@pytest.mark.parametrize("name", ["fpgm", "whc", "activation", "hrank"])
def test_unknown_measures_are_refused(name: str) -> None:
    from tests.support.models.toy import Toy, toy_plan
    from tests.support.recorded_batches import recorded

    model, plan = Toy(), toy_plan()
    options = {"record": recorded(model, plan, name)} if name in criteria.COLLECTED else {}
    with pytest.raises(ScoreError, match="median"):
        criteria.CRITERIA[name](model, plan, normalize="median", **options)
    for how in ("mean", "max", "sum"):
        found = criteria.CRITERIA[name](model, plan, normalize=how, **options)
        assert float(getattr(found[:8], how)()) == pytest.approx(1)


def test_bn_scale_reads_batch_norms_only() -> None:
    """A layer norm also has a weight of one number per unit; it is not a gate of Network Slimming."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.BatchNorm1d(4))
    nn.init.normal_(model[2].weight)
    pieces = tuple(Slice(tensor=n, axis=0, index=range(4), unit=range(4)) for n in ("0.weight", "1.weight", "2.weight"))
    state = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    plan = Plan(
        groups=(Group(name="0", kind="neurons", n_units=4, slices=pieces),),
        tensors=state,
        parameters=tuple(n for n, _ in model.named_parameters()),
    )
    torch.testing.assert_close(criteria.bn_scale(model, plan), model[2].weight.detach().abs())
