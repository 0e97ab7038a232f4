"""Say how `etp` compares with other methods, for the record of a task and for the list of records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common.statistics import Cell, difference, impossible, rival

VERDICTS = {"better": "better than", "within one deviation": "within one deviation of", "worse": "worse than"}


def speed_ups_of(found: Sequence[Cell]) -> list[float]:
    return sorted({cell.speed_up for cell in found if cell.method != "dense"})


def as_times(speed_ups: Sequence[float]) -> str:
    return " and ".join(f"{speed_up:g}x" for speed_up in speed_ups)


def verdict_on(own: Cell, found: Sequence[Cell], name: str, *, higher: bool) -> str:
    other = rival(found, name, own.speed_up)
    if other is None:
        return "not possible" if impossible(found, name, own.speed_up) else "no such run yet"
    apart = difference(own, other, higher=higher)
    return "without verdict (one common seed or none)" if apart is None else apart.mark


def better_methods(own: Cell, found: Sequence[Cell], *, higher: bool) -> list[Cell]:
    """The methods with a better mean at the same speed-up, the best first."""

    def mean(cell: Cell) -> float:
        spread = cell.stage("finetuned")
        return float("-inf") if spread is None else spread.mean * (1 if higher else -1)

    others = [cell for cell in found if cell.ok and cell.speed_up == own.speed_up and cell.method != "dense"]
    return sorted((cell for cell in others if mean(cell) > mean(own)), key=mean, reverse=True)


def difference_text(own: Cell, found: Sequence[Cell], name: str, metric: Mapping[str, Any]) -> str:
    other = rival(found, name, own.speed_up)
    if other is None:
        return "not possible" if impossible(found, name, own.speed_up) else "no such run yet"
    apart = difference(own, other, higher=metric["higher"])
    by, digits = (100.0, 2) if metric["percent"] else (1.0, 3)
    if apart is None:
        left, right = own.by_seed(), other.by_seed()
        both = left.keys() & right.keys()
        return "; ".join(f"{by * (left[k] - right[k]):+.{digits}f}, a single seed" for k in both) or "no common seed"
    return f"{by * apart.mean:+.{digits}f} ± {by * apart.deviation:.{digits}f}, {apart.mark} ({apart.n} seeds)"
