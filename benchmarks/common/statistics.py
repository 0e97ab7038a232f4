"""Figures from the records of runs: means and deviations over seeds, and differences between methods."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import stdtrit

from benchmarks.common.records import Record

CONFIDENCE = 0.95
"""Of all intervals. What is better or worse is so at p < 0.05 over the seeds."""
FEWEST = 3
"""Seeds of a verdict. Two often have the same difference by chance, which gives an interval without width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Mean and sample standard deviation (``None`` for one value) of ``n`` values."""

    mean: float
    deviation: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """The spread; ``None`` of no values."""
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(mean=statistics.fmean(values), deviation=deviation, n=len(values))

    def text(self, *, percent: bool = False, digits: int = 2) -> str:
        """``mean ± deviation``; of one value the value."""
        by = 100.0 if percent else 1.0
        spread = "" if self.deviation is None else f" ± {by * self.deviation:.{digits}f}"
        return f"{by * self.mean:.{digits}f}{spread}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """All runs of one method at one speed-up."""

    method: str
    speed_up: float
    records: tuple[Record, ...]

    @property
    def ok(self) -> tuple[Record, ...]:
        """The runs that gave a network."""
        return tuple(record for record in self.records if record["status"] == "ok")

    def stage(self, stage: str, part: str = "test") -> Spread | None:
        """The metric after a stage."""
        return Spread.of([record[part][stage] for record in self.ok if stage in record[part]])

    def ratio(self, key: str) -> Spread | None:
        """Dense over pruned ``macs``, ``params`` or ``latency``."""
        return Spread.of([record[key][0] / record[key][1] for record in self.ok if record[key][1]])

    def by_seed(self, stage: str = "finetuned") -> dict[int, float]:
        """The metric on the test part after a stage, of the seeds that have it."""
        return {record["config"]["seed"]: record["test"][stage] for record in self.ok if stage in record["test"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A method minus another on the ``n`` seeds that both have; ``better``: towards the better side of the metric."""

    mean: float
    deviation: float
    n: int
    better: bool

    @property
    def half_width(self) -> float:
        """Half of the interval of the mean, by Student's t with n - 1 degrees of freedom."""
        return float(stdtrit(self.n - 1, (1 + CONFIDENCE) / 2)) * self.deviation / math.sqrt(self.n)

    @property
    def mark(self) -> str:
        """Whether the interval is on one side of zero."""
        if abs(self.mean) <= self.half_width:
            return "not significant"
        return "better" if self.better else "worse"

    def text(self, *, percent: bool = False, digits: int = 2) -> str:
        """``mean [low, high]`` in the unit of the metric."""
        by = 100.0 if percent else 1.0
        low, high = self.mean - self.half_width, self.mean + self.half_width
        return f"{by * self.mean:+.{digits}f} [{by * low:+.{digits}f}, {by * high:+.{digits}f}]"


def cells(records: Iterable[Record]) -> list[Cell]:
    """The records by method and speed-up, in the order of their first appearance; the last record of a run counts."""
    latest: dict[tuple[Any, ...], Record] = {}
    for record in records:
        latest[tuple(record["config"].values())] = record
    grouped: dict[tuple[str, float], list[Record]] = {}
    for record in latest.values():
        config = record["config"]
        grouped.setdefault((config["method"], float(config["speed_up"])), []).append(record)
    return [Cell(method=m, speed_up=s, records=tuple(own)) for (m, s), own in grouped.items()]


def trial_seconds(records: Iterable[Record]) -> dict[tuple[str, float, float], float]:
    """Seconds of each trial by method, speed-up and push: once for all runs that share it."""
    found: dict[tuple[str, float, float], float] = {}
    for record in records:
        config = record["config"]
        speed_up = float(record["recipe"].get("tuned_at") or config["speed_up"])
        for trial in record.get("trials", ()):
            if trial.get("seconds"):  # lines from before this was kept have none
                found.setdefault((config["method"], speed_up, trial["push"]), trial["seconds"])
    return found


def difference(own: Cell, other: Cell, *, higher: bool) -> Difference | None:
    """The final metrics of two methods; ``None`` with too few common seeds."""
    return paired(own.by_seed(), other.by_seed(), higher=higher)


def paired(left: Mapping[int, float], right: Mapping[int, float], *, higher: bool) -> Difference | None:
    """Left minus right over the common seeds; ``None`` with fewer than :data:`FEWEST`."""
    pairs = [left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())]
    if len(pairs) < FEWEST:
        return None
    mean = statistics.fmean(pairs)
    return Difference(mean=mean, deviation=statistics.stdev(pairs), n=len(pairs), better=(mean > 0) == higher)
