"""Schedules: functions from training progress in [0, 1] to a fraction in [0, 1] of the final sparsity or strength.

Each is a frozen configuration and is called with the progress of the phase, t = step / steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from etp_graph._config import Configured, build_named, is_number, require


class Schedule(Configured, ABC):
    """Function from progress to fraction. For a schedule of your own, subclass it as a frozen dataclass."""

    __slots__ = ()

    def __call__(self, progress: float) -> float:
        """Return the fraction at ``progress``; raise :class:`ForceError` unless ``progress`` is in [0, 1]."""
        require(
            is_number(progress) and 0 <= progress <= 1,
            f"{self.name}: progress={progress!r}; it must lie in [0, 1] (step / steps).",
        )
        return self.at(progress)

    @abstractmethod
    def at(self, progress: float) -> float:
        """Evaluate the equation for a ``progress`` in [0, 1]."""


def _fraction(owner: Schedule, field: str, value: float) -> None:
    require(is_number(value) and 0 <= value <= 1, f"{owner.name}: {field}={value!r}; it must lie in [0, 1].")


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
        require(
            isinstance(self.steps, int) and not isinstance(self.steps, bool) and self.steps >= 1,
            f"iterative: steps={self.steps!r}; it must be an integer of at least 1.",
        )

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
        require(is_number(self.end) and 0 < self.end <= 1, f"warm_up: end={self.end!r}; it must lie in (0, 1].")

    def at(self, progress: float) -> float:
        """See :class:`Schedule`."""
        return min(1.0, progress / self.end)


constant = Constant

one_shot = OneShot

cubic = Cubic


def iterative(steps: int) -> Iterative:
    """Return the schedule ⌊k·t⌋ / k with k = ``steps``."""
    return Iterative(steps=steps)


def warm_up(end: float = 0.1) -> WarmUp:
    """Return the schedule min(1, t / end)."""
    return WarmUp(end=end)


SCHEDULES: Mapping[str, type[Schedule]] = {
    schedule.name: schedule for schedule in (Constant, OneShot, Iterative, Cubic, WarmUp)
}
"""Every schedule of the library, by name."""


def from_json(source: str | Mapping[str, Any]) -> Schedule:
    """Return the schedule that ``to_json`` or ``to_dict`` wrote; raise :class:`etp_graph.ForceError` if it is none."""
    return build_named(SCHEDULES, source, what="schedule")
