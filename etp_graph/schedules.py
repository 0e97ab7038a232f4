"""Schedules: functions from training progress in [0, 1] to a fraction in [0, 1] of the final sparsity or strength.

Each is a frozen configuration and is called with the progress of the phase, t = step / steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

from etp_graph._config import Configured, Registry, build_named, register_class, require, require_count, require_number
from etp_graph.errors import ForceError

SCHEDULES: Registry[type[Schedule]] = Registry(
    "schedule", error=ForceError, remedy="One of your own is known once the module that registers it is imported."
)
"""Every registered schedule, by name."""


class Schedule(Configured, ABC):
    """Function from progress to fraction.

    A schedule of your own is a frozen dataclass that derives from this class. ``register`` lets it go to JSON.
    """

    __slots__ = ()
    registry: ClassVar[Registry[type[Any]]] = SCHEDULES

    def __call__(self, progress: float) -> float:
        """Return the fraction at ``progress``; raise :class:`ForceError` unless ``progress`` is in [0, 1]."""
        require_number(f"{self.name}: progress", progress, 0, 1, why="the share step / steps")
        return self.at(progress)

    @abstractmethod
    def at(self, progress: float) -> float:
        """Evaluate the equation for a ``progress`` in [0, 1]."""


def _fraction(owner: Schedule, field: str, value: float) -> None:
    require_number(f"{owner.name}: {field}", value, 0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant(Schedule):
    """``value`` in every step."""

    name: ClassVar[str] = "constant"
    value: float = 1.0

    def __post_init__(self) -> None:
        _fraction(self, "value", self.value)

    def at(self, progress: float) -> float:
        """See :class:`Schedule`."""
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class OneShot(Schedule):
    """1[t ≥ start]: 0 before ``start``, 1 from there on. By default ``start`` is the end of the phase."""

    name: ClassVar[str] = "one_shot"
    start: float = 1.0

    def __post_init__(self) -> None:
        _fraction(self, "start", self.start)

    def at(self, progress: float) -> float:
        """See :class:`Schedule`."""
        return float(progress >= self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Iterative(Schedule):
    """⌊k·t⌋ / k: k = ``steps`` equal increments, at t = 1/k, 2/k, ..., 1; k = 1 is one-shot (Han et al. 2015)."""

    name: ClassVar[str] = "iterative"
    steps: int

    def __post_init__(self) -> None:
        require_count("iterative: steps", self.steps, 1)

    def at(self, progress: float) -> float:
        """See :class:`Schedule`."""
        # Without the tolerance some increments would be one step late: 22 * (15 / 22) is below 15 in floating point.
        return min(1.0, math.floor(self.steps * progress * (1 + 1e-12) + 1e-12) / self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cubic(Schedule):
    """s_t = s_f + (s_i − s_f)·(1 − (t − t_0)/(n·Δt))³ for t_0 ≤ t ≤ t_0 + n·Δt (Zhu & Gupta 2017, eq. 1).

    Attributes:
        initial: s_i, the fraction until ``begin``.
        final: s_f, the fraction from ``end`` on.
        begin: t_0, as progress.
        end: t_0 + n·Δt, as progress.
    """

    name: ClassVar[str] = "cubic"
    initial: float = 0.0
    final: float = 1.0
    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        for field in ("initial", "final", "begin", "end"):
            _fraction(self, field, getattr(self, field))
        require(self.begin < self.end, f"cubic: begin={self.begin!r}, end={self.end!r}; begin must come before end.")
        require(
            self.initial <= self.final,
            f"cubic: initial={self.initial!r}, final={self.final!r}; units that are gone do not come back.",
        )

    def at(self, progress: float) -> float:
        """See :class:`Schedule`."""
        done = min(1.0, max(0.0, (progress - self.begin) / (self.end - self.begin)))
        return self.final + (self.initial - self.final) * (1 - done) ** 3


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUp(Schedule):
    """min(1, t / end): linear from 0 to 1 at ``end``, then constant."""

    name: ClassVar[str] = "warm_up"
    end: float = 0.1

    def __post_init__(self) -> None:
        require_number("warm_up: end", self.end, 0, 1, excluded=(0,))

    def at(self, progress: float) -> float:
        """See :class:`Schedule`."""
        return min(1.0, progress / self.end)


@dataclass(frozen=True, slots=True, kw_only=True)
class PiecewiseLinear(Schedule):
    """Straight lines through given points, constant before the first and after the last.

    Attributes:
        points: pairs (progress, fraction); progress rises strictly, fractions do not fall, all are in [0, 1].
    """

    name: ClassVar[str] = "piecewise_linear"
    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        try:
            points = tuple((t, value) for t, value in self.points)
        except (TypeError, ValueError):
            points = ()
        require(bool(points), f"piecewise_linear: points={self.points!r}; give pairs (progress, fraction).")
        for t, value in points:
            require_number("piecewise_linear: progress", t, 0, 1)
            require_number("piecewise_linear: fraction", value, 0, 1)
        rises = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(points))
        require(rises, f"piecewise_linear: points={points}; progress has to rise, and no fraction may fall.")
        object.__setattr__(self, "points", points)  # JSON has lists

    def at(self, progress: float) -> float:
        """See :class:`Schedule`."""
        first, last = self.points[0], self.points[-1]
        if progress <= first[0] or len(self.points) == 1:
            return first[1]
        for (t0, low), (t1, high) in pairwise(self.points):
            if progress <= t1:
                return low + (high - low) * min(1.0, (progress - t0) / (t1 - t0))
        return last[1]


constant = Constant

piecewise_linear = PiecewiseLinear

one_shot = OneShot

cubic = Cubic


def iterative(steps: int) -> Iterative:
    """Return the schedule ⌊k·t⌋ / k with k = ``steps``."""
    return Iterative(steps=steps)


def warm_up(end: float = 0.1) -> WarmUp:
    """Return the schedule min(1, t / end)."""
    return WarmUp(end=end)


S = TypeVar("S", bound=Schedule)


def register(schedule: type[S]) -> type[S]:
    """Add a schedule class to :data:`SCHEDULES`, so that it goes to JSON and back; use it as a decorator or call it.

    Its name in JSON is its class attribute ``name``, or else its import path ``module:qualname``.

    Args:
        schedule: a frozen dataclass that derives from :class:`Schedule`.

    Returns:
        The class.

    Raises:
        ForceError: this is no such class, or another schedule has its name.
    """
    return register_class(schedule, Schedule)


for _schedule in (Constant, OneShot, Iterative, Cubic, WarmUp, PiecewiseLinear):
    register(_schedule)


def from_json(source: str | Mapping[str, Any]) -> Schedule:
    """Return the schedule that ``to_json`` or ``to_dict`` wrote.

    Raises:
        ForceError: this is no schedule, or its class is not registered.
    """
    found: Schedule = build_named(SCHEDULES, source)
    return found
