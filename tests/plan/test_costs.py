"""Counts against hand counts, smaller networks built directly, and torch's own counter."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from etp_graph.budget._levels import LevelCosts
from etp_graph.errors import PlanError, SelectionError
from etp_graph.plan import Cost, CostModel, Op, Plan, Positions, Selection, cost
from tests.support.models.synthetic import synthetic
from tests.support.models.toy import Toy, toy_plan


class SmallToy(nn.Module):
    """:class:`Toy` with other widths, built directly."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1)
        self.linear = nn.Linear(4 * second, 5)

    forward = Toy.forward


def pick(plan: Plan, seed: int) -> Tensor:
    """A random keep vector that leaves locked groups whole and one unit everywhere."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(plan.n_units, generator=generator) > 0.4
    for group, span in plan.spans():
        keep[span.start] = True
        if group.locked:
            keep[span] = True
    return keep


def naive(plan: Plan, keep: Tensor) -> tuple[int, int]:
    """The definition, position by position, with no cache."""
    removed: dict[tuple[str, int], set[int]] = {}
    for group, span in plan.spans():
        for piece in group.slices:
            gone = removed.setdefault((piece.tensor, piece.axis), set())
            for index, unit in zip(list(piece.index), list(piece.unit), strict=True):
                if not keep[span.start + int(unit)]:
                    gone.add(int(index))

    def kept(tensor: str, axis: int) -> int:
        return plan.tensors[tensor][axis] - len(removed.get((tensor, axis), ()))

    macs = sum(op.coefficient * prod(kept(*pair) for pair in op.axes) for op in plan.ops)
    return macs, sum(prod(kept(name, a) for a in range(len(plan.tensors[name]))) for name in plan.parameters)


def test_dense_toy_by_hand() -> None:
    found = cost(Toy(), toy_plan())
    assert found.macs == 64 * 9 * (3 * 8 + 8 * 6) + 24 * 5
    assert found.params == 3 * 8 * 9 + 2 * 8 + 8 * 6 * 9 + 6 + 24 * 5 + 5


@pytest.mark.parametrize(("first", "second"), list(itertools.product((8, 5, 1), (6, 4, 1))))
def test_equals_the_smaller_network_built_directly(first: int, second: int) -> None:
    plan = toy_plan()
    keep = torch.cat([torch.arange(8) < first, torch.arange(6) >= 6 - second, torch.ones(5, dtype=torch.bool)])
    found = cost(Toy(), plan, Selection.from_flat(plan, keep))
    small = SmallToy(first, second)
    assert found.params == sum(p.numel() for p in small.parameters())
    counter = FlopCounterMode(display=False)
    with counter:
        small(torch.zeros(1, 3, 8, 8))
    assert 2 * found.macs == counter.get_total_flops()


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_definition_on_random_plans(seed: int) -> None:
    _, plan = synthetic(seed, coarse=seed % 3 + 1)
    model = CostModel(plan)
    for draw in range(5):
        keep = pick(plan, draw)
        found = model.evaluate(keep)
        assert (found.macs, found.params) == naive(plan, keep)
    assert (model.dense.macs, model.dense.params) == naive(plan, torch.ones(plan.n_units))


@pytest.mark.parametrize("seed", range(3))
def test_marginal_is_the_cost_without_one_unit(seed: int) -> None:
    _, plan = synthetic(seed)
    model = CostModel(plan)
    macs, params = model.marginal("macs"), model.marginal("params")
    assert macs.shape == params.shape == (plan.n_units,)
    for unit in random.Random(seed).sample(range(plan.n_units), 40):
        keep = torch.ones(plan.n_units, dtype=torch.bool)
        keep[unit] = False
        without = model.evaluate(keep)
        assert model.dense.macs - without.macs == macs[unit]
        assert model.dense.params - without.params == params[unit]


@pytest.mark.parametrize("seed", range(3))
def test_staircase_equals_evaluate(seed: int) -> None:
    _, plan = synthetic(seed)
    model = CostModel(plan)
    rng = np.random.default_rng(seed)
    column, level = np.full(plan.n_units, -1), np.full(plan.n_units, -1)
    heights = []
    for group, span in plan.spans():
        if group.locked is None:
            column[span] = len(heights)
            level[span] = rng.integers(0, 3, group.n_units)
            level[span.start] = column[span.start] = -1
            heights.append(3)
    stairs = LevelCosts(model, column=column, level=level, n_levels=np.array(heights))
    points = rng.integers(0, 4, (20, len(heights)))
    found = stairs(points)
    for k, macs, params in zip(points, found["macs"].tolist(), found["params"].tolist(), strict=True):
        keep = torch.from_numpy((column < 0) | (level >= k[column]))
        found = model.evaluate(keep)
        assert (found.macs, found.params) == (macs, params)


def test_random_plans_have_positions_of_two_units() -> None:
    _, plan = synthetic(0)
    assert any(len(axis.maps) == 2 for parts in Positions(plan).axes.values() for axis in parts)


@pytest.mark.parametrize("coefficient", [2**40, 2**70])
def test_counts_beyond_64_bits_are_exact(coefficient: int) -> None:
    plan = toy_plan()
    huge = replace(plan, ops=tuple(replace(op, coefficient=op.coefficient * coefficient) for op in plan.ops))
    keep = pick(plan, 0)
    assert CostModel(huge).evaluate(keep).macs == CostModel(plan).evaluate(keep).macs * coefficient


def test_uncounted_operators_are_passed_on() -> None:
    plan = replace(toy_plan(), uncounted=("fft",))
    assert cost(Toy(), plan).uncounted == ("fft",)


def test_model_and_selection_are_untouched() -> None:
    model, plan = Toy(), toy_plan()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    keep = pick(plan, 1)
    selection = Selection.from_flat(plan, keep)
    cost(model, plan, selection)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(selection.flat(plan), keep)


def test_errors() -> None:
    plan = toy_plan()
    with pytest.raises(PlanError, match="lacks"):
        cost(nn.Linear(2, 2), plan)
    for group, message in (("linear", "locked"), ("conv1", "at least 1")):
        with pytest.raises(SelectionError, match=message):
            cost(Toy(), plan, Selection({group: torch.zeros(plan[group].n_units, dtype=torch.bool)}))
    with pytest.raises(PlanError, match=r"axis 7 of 'conv1\.weight'"):
        CostModel(replace(plan, ops=(Op(name="x", coefficient=1, axes=(("conv1.weight", 7),)),)))


def test_json() -> None:
    one = Cost(macs=2**70, params=3, uncounted=("a", "b"))
    assert Cost.from_json(one.to_json()) == one


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"macs": 1, "params": "2", "uncounted": []}', '{"macs": true}',
                                  '{"macs": 1, "params": 2, "uncounted": [3]}', "3"])  # fmt: skip
def test_json_of_something_else(text: str) -> None:
    with pytest.raises(PlanError, match="not a cost"):
        Cost.from_json(text)


def test_a_plan_without_groups_or_ops() -> None:
    plan = replace(toy_plan(), groups=(), ops=())
    assert cost(Toy(), plan).macs == 0
    assert cost(Toy(), plan, Selection({})).params == sum(p.numel() for p in Toy().parameters())
