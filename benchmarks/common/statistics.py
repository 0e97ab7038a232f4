"""Figures from the records of runs: means and deviations over seeds, and differences between methods."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common.contestant_names import RIVALS
from benchmarks.common.records import Record


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

    def by_seed(self) -> dict[int, float]:
        """The final metric on the test part."""
        return {record["config"]["seed"]: record["test"]["finetuned"] for record in self.ok}


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A method minus another on the seeds that both have; ``better``: towards the better side of the metric."""

    mean: float
    deviation: float
    n: int
    better: bool

    @property
    def mark(self) -> str:
        """Whether it is more than one standard deviation of the difference."""
        if abs(self.mean) <= self.deviation:
            return "within one deviation"
        return "better" if self.better else "worse"


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


def difference(own: Cell, other: Cell, *, higher: bool) -> Difference | None:
    """The final metrics of two methods; ``None`` with fewer than two common seeds."""
    return paired(own.by_seed(), other.by_seed(), higher=higher)


def paired(left: Mapping[int, float], right: Mapping[int, float], *, higher: bool) -> Difference | None:
    """Left minus right over the common seeds; ``None`` with fewer than two, which say nothing about chance."""
    pairs = [left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())]
    if len(pairs) < 2:
        return None
    mean = statistics.fmean(pairs)
    return Difference(mean=mean, deviation=statistics.stdev(pairs), n=len(pairs), better=(mean > 0) == higher)


def impossible(found: Sequence[Cell], name: str, speed_up: float) -> bool:
    """Whether a rival was asked for at a speed-up, and gave no network."""
    return any(cell.method == RIVALS[name] and cell.speed_up == speed_up and not cell.ok for cell in found)


def rival(found: Sequence[Cell], name: str, speed_up: float) -> Cell | None:
    """The runs of a rival at a speed-up, if it gave any network."""
    for cell in found:
        if cell.method == RIVALS[name] and cell.speed_up == speed_up and cell.ok:
            return cell
    return None
