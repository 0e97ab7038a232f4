"""Forces: the equations of the papers, their shape as functions, their JSON, and what they refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from etp_graph import forces
from etp_graph.errors import ForceError
from etp_graph.forces import FORCES, Force

ALL: list[Force] = [
    forces.linear(), forces.heaviside(), forces.heaviside(epsilon=0.3, threshold=0.9), forces.exponential(),
    forces.exponential(rate=0.0), forces.uniform(), forces.growing(), forces.growing(alpha=2.5),
    forces.linear_l1(), forces.lasso(), forces.ridge(), forces.ridge(threshold=0.1),
    forces.exponential(base=1.05), forces.exponential(divided_by="n_units"),
]  # fmt: skip
ids = [repr(force) for force in ALL]


def grid(n: int = 9) -> Tensor:
    return torch.arange(n, dtype=torch.float64) / max(n - 1, 1)


def test_the_table_misses_no_force() -> None:
    assert {force.name for force in ALL} == set(FORCES)


@pytest.mark.parametrize("force", ALL, ids=ids)
@pytest.mark.parametrize("n", [1, 2, 9, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_not_negative_not_decreasing_one_per_unit(force: Force, n: int, dtype: torch.dtype) -> None:
    distance = grid(n).to(dtype)
    found = force(distance, size=n, importance=1 - distance)
    assert found.shape == (n,)
    assert found.dtype == dtype
    assert bool(found.isfinite().all())
    assert bool((found >= 0).all())
    assert bool((found.diff() >= 0).all())


@pytest.mark.parametrize("force", ALL, ids=ids)
def test_each_unit_on_its_own(force: Force) -> None:
    """Runs may be evaluated together or apart: the force of a unit depends on its own context only."""
    distance, size = grid(), torch.full((9,), 9)
    together = force(distance, size=size, importance=1 - distance)
    apart = [force(distance[i : i + 1], size=size[i : i + 1], importance=1 - distance[i : i + 1]) for i in range(9)]
    # Vectorised and single exponentials differ in the last bit on some CPUs.
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("force", "equation"),
    [
        (forces.linear(), lambda i, n: i),
        (forces.heaviside(epsilon=0.3, threshold=0.5), lambda i, n: 0.3 if i / (n - 1) >= 0.5 else 0.0),
        (forces.exponential(rate=5.0), lambda i, n: math.exp(5 / (n - 1)) ** i),
        (forces.exponential(base=1.2), lambda i, n: 1.2**i),
        (forces.exponential(divided_by="n_units"), lambda i, n: math.exp(5 / n) ** i),
        (forces.uniform(), lambda i, n: 1.0),
        (forces.linear_l1(), lambda i, n: i),
        (forces.lasso(), lambda i, n: 1.0),
        (forces.ridge(threshold=0.5), lambda i, n: float(i / (n - 1) >= 0.5)),
        (forces.growing(alpha=4.0), lambda i, n: 2 ** (4 * i / (n - 1))),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
@pytest.mark.parametrize("n", [2, 5, 64])
def test_the_equation_of_the_paper(force: Force, equation: Callable[[int, int], float], n: int) -> None:
    """As written there, for the unit at index i of n, whose importance falls evenly from the first to the last."""
    found = force(grid(n), size=n, importance=1 - grid(n))
    torch.testing.assert_close(found, torch.tensor([equation(i, n) for i in range(n)], dtype=torch.float64))


def test_linear_without_size_counts_the_distances() -> None:
    assert forces.linear()(grid(5)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("force", ALL, ids=ids)
def test_json_and_back(force: Force) -> None:
    assert forces.from_json(force.to_json()) == force
    assert forces.from_json(force.to_dict()) == force
    assert json.loads(force.to_json())["name"] == force.name


@given(rate=st.floats(0, 80))
def test_json_keeps_every_rate_exactly(rate: float) -> None:
    assert forces.from_json(forces.exponential(rate=rate).to_json()) == forces.exponential(rate=rate)


@pytest.mark.parametrize(
    "make",
    [
        lambda: forces.heaviside(epsilon=0), lambda: forces.heaviside(epsilon=math.inf),
        lambda: forces.ridge(threshold=2), lambda: forces.ridge(threshold="1"),
        lambda: forces.heaviside(threshold=-0.1), lambda: forces.heaviside(threshold=1.1),
        lambda: forces.exponential(rate=-1), lambda: forces.exponential(rate=math.nan),
        lambda: forces.exponential(rate=81), lambda: forces.exponential(rate=True),
        lambda: forces.exponential(base=0.9), lambda: forces.exponential(base=math.inf),
        lambda: forces.exponential(base=1.1, divided_by="n_units"), lambda: forces.exponential(divided_by="N"),
        lambda: forces.exponential(rate="5"), lambda: forces.growing(alpha=-1), lambda: forces.growing()(grid()),
        lambda: forces.from_json("{"), lambda: forces.from_json("[]"), lambda: forces.from_json("{}"),
        lambda: forces.from_json('{"name": "gravity"}'), lambda: forces.from_json('{"name": "linear", "rate": 1}'),
        lambda: forces.from_json('{"name": ["linear"]}'),
        lambda: forces.from_json({"name": "exponential", "rate": None}),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ForceError):
        make()


def test_a_base_that_overflows_is_refused_with_the_largest_that_does_not() -> None:
    """1.2^999 is 10^79; the remedy in the message works in the same layer."""
    with pytest.raises(ForceError, match=r"base=1\.2 overflows.*1000 units.*base <= 1\.08") as caught:
        forces.exponential(base=1.2)(grid(1000).float())
    largest = float(str(caught.value).split("base <= ")[1].split(",")[0])
    assert bool(forces.exponential(base=largest)(grid(1000).float()).isfinite().all())
    sizes = torch.tensor([4] * 4 + [1000] * 4)
    with pytest.raises(ForceError, match="1000 units"):
        forces.exponential(base=1.2)(torch.rand(8), size=sizes)


def test_fields_that_are_not_set_are_not_written() -> None:
    assert forces.exponential().to_dict() == {"name": "exponential", "rate": 5.0}


def test_errors_say_what_there_is_instead() -> None:
    with pytest.raises(ForceError, match=r"'gravity'.*linear, .*exponential, .*growing"):
        forces.from_json('{"name": "gravity"}')
    with pytest.raises(ForceError, match=r"Its fields are rate"):
        forces.from_json('{"name": "exponential", "speed": 1}')
