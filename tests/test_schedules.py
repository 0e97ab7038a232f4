"""Schedules: within [0, 1], monotone, the equations, JSON, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etp_graph import schedules
from etp_graph.errors import ForceError
from etp_graph.schedules import SCHEDULES, Schedule

ALL: list[Schedule] = [
    schedules.constant(), schedules.constant(value=0.25), schedules.one_shot(), schedules.one_shot(start=0.5),
    schedules.iterative(1), schedules.iterative(7), schedules.cubic(),
    schedules.cubic(initial=0.1, final=0.7, begin=0.2, end=0.8), schedules.warm_up(), schedules.warm_up(end=1.0),
    schedules.piecewise_linear(points=((0.0, 0.0), (0.1, 0.01), (0.9, 1.0))),
    schedules.piecewise_linear(points=((0.5, 0.3),)),
]  # fmt: skip
ids = [repr(schedule) for schedule in ALL]


def test_the_table_misses_no_schedule() -> None:
    assert {schedule.name for schedule in ALL} == set(SCHEDULES)


@pytest.mark.parametrize("schedule", ALL, ids=ids)
@given(first=st.floats(0, 1), second=st.floats(0, 1))
def test_a_fraction_that_never_falls(schedule: Schedule, first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert 0 <= schedule(low) <= schedule(high) <= 1


@pytest.mark.parametrize(
    ("schedule", "start", "end"),
    [
        (schedules.constant(value=0.25), 0.25, 0.25), (schedules.one_shot(), 0, 1), (schedules.iterative(7), 0, 1),
        (schedules.cubic(initial=0.1, final=0.7), 0.1, 0.7), (schedules.cubic(begin=0.5), 0, 1),
        (schedules.warm_up(), 0, 1), (schedules.piecewise_linear(points=((0.2, 0.1), (0.8, 0.7))), 0.1, 0.7),
    ],
)  # fmt: skip
def test_both_ends(schedule: Schedule, start: float, end: float) -> None:
    assert schedule(0) == pytest.approx(start)
    assert schedule(1) == pytest.approx(end)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 49, 100])
def test_iterative_takes_exactly_its_rounds(steps: int) -> None:
    schedule = schedules.iterative(steps)
    assert [schedule(k / steps) for k in range(steps + 1)] == [k / steps for k in range(steps + 1)]
    assert len({schedule(k / 10000) for k in range(10001)}) == steps + 1


@given(st.floats(0, 1 - 1e-9) | st.just(1.0))
def test_one_round_is_one_shot(progress: float) -> None:
    assert schedules.iterative(1)(progress) == schedules.one_shot()(progress)


@given(
    progress=st.floats(0, 1),
    initial=st.floats(0, 0.5),
    final=st.floats(0.5, 1),
    begin=st.floats(0, 0.4),
    end=st.floats(0.5, 1),
)
def test_cubic_is_the_equation_of_zhu_and_gupta(
    progress: float, initial: float, final: float, begin: float, end: float
) -> None:
    found = schedules.cubic(initial=initial, final=final, begin=begin, end=end)(progress)
    t = min(max(progress, begin), end)
    assert found == pytest.approx(final + (initial - final) * (1 - (t - begin) / (end - begin)) ** 3, abs=1e-12)


def test_warm_up_is_straight() -> None:
    schedule = schedules.warm_up(end=0.4)
    assert [schedule(t) for t in (0, 0.1, 0.2, 0.4, 0.9)] == pytest.approx([0, 0.25, 0.5, 1, 1])


def test_lines_go_through_their_points() -> None:
    schedule = schedules.piecewise_linear(points=((0.1, 0.0), (0.3, 0.1), (0.5, 0.9)))
    found = [schedule(t) for t in (0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 1)]
    assert found == pytest.approx([0, 0, 0.05, 0.1, 0.3, 0.5, 0.9, 0.9])


@pytest.mark.parametrize("schedule", ALL, ids=ids)
def test_json_and_back(schedule: Schedule) -> None:
    assert schedules.from_json(schedule.to_json()) == schedule


@pytest.mark.parametrize("schedule", ALL, ids=ids)
@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan, math.inf, "0.5", True])
def test_progress_outside_is_refused(schedule: Schedule, progress: float) -> None:
    with pytest.raises(ForceError, match="progress"):
        schedule(progress)


@pytest.mark.parametrize(
    "make",
    [
        lambda: schedules.constant(value=1.5), lambda: schedules.one_shot(start=-1), lambda: schedules.iterative(0),
        lambda: schedules.iterative(2.5), lambda: schedules.cubic(begin=0.5, end=0.5),
        lambda: schedules.cubic(initial=0.9, final=0.5), lambda: schedules.cubic(final=math.nan),
        lambda: schedules.piecewise_linear(points=()), lambda: schedules.piecewise_linear(points=(0.5, 1.0)),
        lambda: schedules.piecewise_linear(points=((0.5, 0.0), (0.5, 1.0))),
        lambda: schedules.piecewise_linear(points=((0.1, 0.9), (0.5, 0.1))),
        lambda: schedules.piecewise_linear(points=((0.1, 0.9), (1.5, 1.0))),
        lambda: schedules.warm_up(end=0), lambda: schedules.from_json('{"name": "cosine"}'),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ForceError):
        make()
