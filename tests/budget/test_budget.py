"""Budgets: what is refused, what goes to JSON and back, and what the targets are in integers."""

from __future__ import annotations

from typing import Any

import pytest

from etp_graph.budget import Budget
from etp_graph.errors import BudgetError
from etp_graph.plan import Cost


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"), ({"speed_up": 2, "macs": 5}, "speed_up and macs"),
        ({"macs": 2, "params": 5}, "exactly one"),
        ({"latency_ms": 3, "speed_up_latency": 2}, "latency_ms and speed_up_latency"),
        ({"latency_ms": 0}, r"latency_ms=0; it must lie in \(0, inf\)"), ({"latency_ms": -1.5}, r"in \(0, inf\)"),
        ({"latency_ms": "3"}, r"in \(0, inf\)"), ({"speed_up_latency": 0.9}, r"in \[1, inf\)"),
        ({"speed_up_latency": 2, "round_to": 0}, "round_to"),
        ({"latency_ms": 2, "tolerance": 1.5}, "tolerance"), ({"latency_ms": 2, "tolerance": None}, "tolerance"),
        ({"speed_up": 0.5}, r"speed_up=0.5; it must lie in \[1, inf\), since a speed_up of 2 halves the MACs"),
        ({"speed_up": float("nan")}, "speed_up=nan"), ({"speed_up": float("inf")}, r"\[1, inf\)"),
        ({"speed_up": True}, r"\[1, inf\)"), ({"speed_up": "9"}, r"\[1, inf\)"), ({"speed_up": -3}, r"\[1, inf\)"),
        ({"macs": -1}, r"\[0, inf\)"), ({"params": float("nan")}, r"\[0, inf\)"),
        ({"speed_up": 2, "min_units": 0}, "min_units"), ({"speed_up": 2, "min_units": 1.5}, "min_units"),
        ({"speed_up": 2, "round_to": 0}, "round_to"), ({"speed_up": 2, "round_to": True}, "round_to"),
        ({"speed_up": 2, "max_ratio": 1.2}, r"in \[0, 1\]"), ({"speed_up": 2, "max_ratio": float("nan")}, "max_ratio"),
        ({"speed_up": 2, "scope": "layer"}, "'isomorphic'"), ({"speed_up": 2, "rank": "mac"}, "'score_per_mac'"),
    ],
)  # fmt: skip
def test_a_malformed_budget_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**arguments)


@pytest.mark.parametrize(
    "budget", [Budget(speed_up=9, min_units=3, scope="local"), Budget(macs=10**30),
               Budget(params=5, round_to=8, max_ratio=0.5), Budget(latency_ms=1.5, tolerance=0.05),
               Budget(speed_up_latency=2, round_to=16)]
)  # fmt: skip
def test_budget_json(budget: Budget) -> None:
    assert Budget.from_json(budget.to_json()) == budget


@pytest.mark.parametrize("text", ["", "[1]", "3", '{"speedup": 3}', '{"speed_up": 0.1}', "{}"])
def test_budget_json_of_something_else(text: str) -> None:
    with pytest.raises(BudgetError):
        Budget.from_json(text)


def test_macs_may_be_written_as_a_float() -> None:
    assert Budget(macs=2.5e3).macs == 2500  # type: ignore[arg-type]


@pytest.mark.parametrize("speed_up", [1, 1.1, 1.5, 3, 7.3, 9.0, 1e6])
@pytest.mark.parametrize("macs", [1, 999, 10**9 + 7, 10**25 + 1])
def test_the_target_is_the_largest_that_is_fast_enough(speed_up: float, macs: int) -> None:
    dense = Cost(macs=macs, params=1)
    budget = Budget(speed_up=speed_up)
    target = budget.target(dense)
    top, bottom = speed_up.as_integer_ratio()
    assert target * top <= macs * bottom < (target + 1) * top


@pytest.mark.parametrize("reached", [1, 7, 333, 999_999])
def test_what_is_said_to_be_reachable_can_be_asked_for(reached: int) -> None:
    dense = Cost(macs=10**6, params=10**6)
    for name in ("speed_up", "macs", "params"):
        said = Budget(**{name: 10}).reachable(dense, reached)  # type: ignore[arg-type]
        assert said.startswith(f"{name}=")
        value = float(said.partition("=")[2])
        if name != "speed_up" or value >= 1:
            assert Budget(**{name: value}).target(dense) >= reached  # type: ignore[arg-type]


def test_only_a_latency_leaves_the_multiple_open() -> None:
    assert Budget(speed_up=2).round_to == Budget(params=3).round_to == 1
    assert Budget(latency_ms=2).round_to is None


@pytest.mark.parametrize("dense", [0.004, 1.7])
def test_a_latency_is_a_share_of_the_dense_one(dense: float) -> None:
    assert Budget(speed_up_latency=4).share_of_time(dense) == 0.25
    assert Budget(latency_ms=2.0).share_of_time(dense) == pytest.approx(0.002 / dense)
