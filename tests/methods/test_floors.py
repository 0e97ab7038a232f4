"""The floors of a method and of a budget: the stricter one holds, also for floors by kind of unit."""

from __future__ import annotations

from dataclasses import replace

import pytest

import etp_graph as etp
from etp_graph import methods


@pytest.mark.parametrize(("method", "budget", "neurons", "heads"), [
    (None, {"neurons": 8}, 8, 1), (4, {"neurons": 8}, 8, 4), (4, {"neurons": 2}, 4, 4), (4, 2, 4, 4), (None, 2, 2, 2),
])  # fmt: skip
def test_the_stricter_floor_holds(method: int | None, budget: object, neurons: int, heads: int) -> None:
    given = etp.Budget(speed_up=2, min_units=budget)
    found = replace(methods.get("l1"), min_units=method).with_rules(given).min_units
    by_kind = {"neurons": found, "heads": found} if isinstance(found, int) else {"heads": 1, **found}
    assert (by_kind["neurons"], by_kind["heads"]) == (neurons, heads)
