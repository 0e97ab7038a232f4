"""Say how `etp` compares with other methods, for the record of a task and for the pages on all tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.common.contestant_names import DISTILLED, STRONGEST, UNPRUNED, stands_for
from benchmarks.common.statistics import FEWEST, Cell, Difference, difference

VERDICTS = {"better": "better than", "not significant": "not significantly different from", "worse": "worse than"}
NO_VERDICT = "without verdict (fewer than three common seeds)"


def speed_ups_of(found: Sequence[Cell]) -> list[float]:
    """Return the speed-ups at which something was pruned."""
    return sorted({cell.speed_up for cell in found if cell.method != UNPRUNED})


def as_times(speed_ups: Sequence[float]) -> str:
    """Write speed-ups in a sentence."""
    *first, last = [f"{speed_up:g}x" for speed_up in speed_ups]
    return f"{', '.join(first)} and {last}" if first else last


def rival(own: Cell, found: Sequence[Cell], name: str, *, higher: bool) -> Cell | None:
    """Return the runs of a rival at the speed-up of ``own``; None if it gave no network.

    Of several methods the one with the best mean on the validation part counts: to choose by the test part would favour
    the rival by chance. Those whose seeds are too few for a verdict count where all others are too.
    """
    others = [
        cell for cell in found
        if cell.ok and cell.speed_up == own.speed_up and cell.method not in (own.method, UNPRUNED)
        and (stands_for(cell.method, name, own.method) if name != STRONGEST else _on_equal_terms(own, cell))
    ]  # fmt: skip
    return max(
        others, key=lambda cell: (min(FEWEST, _n_common(own, cell)), _mean(cell, "val", higher=higher)), default=None
    )


def against(own: Cell, found: Sequence[Cell], name: str, *, higher: bool) -> tuple[Cell, Difference] | str:
    """Return a rival and the difference to it, or why there is none."""
    other = rival(own, found, name, higher=higher)
    if other is None:
        return "not possible" if _was_asked(own, found, name) else "no such run yet"
    apart = difference(own, other, higher=higher)
    return NO_VERDICT if apart is None else (other, apart)


def verdict_on(own: Cell, found: Sequence[Cell], name: str, *, higher: bool) -> str:
    """Return the verdict on a rival in one word, or why there is none."""
    result = against(own, found, name, higher=higher)
    return result if isinstance(result, str) else result[1].mark


def better_methods(own: Cell, found: Sequence[Cell], *, higher: bool) -> list[Cell]:
    """Return the methods with a better mean on the test part at the same speed-up, the best first."""
    others = [cell for cell in found if cell.ok and cell.speed_up == own.speed_up and cell.method != UNPRUNED]
    means = {cell.method: _mean(cell, "test", higher=higher) for cell in [*others, own]}
    return sorted(
        (cell for cell in others if means[cell.method] > means[own.method]), key=lambda c: means[c.method], reverse=True
    )


def difference_text(own: Cell, found: Sequence[Cell], name: str, metric: Mapping[str, Any]) -> str:
    """Write the difference to a rival with its interval, its verdict and which method it was."""
    result = against(own, found, name, higher=metric["higher"])
    digits = 2 if metric["percent"] else 3
    if not isinstance(result, str):
        other, apart = result
        return f"{apart.text(percent=metric['percent'], digits=digits)}, {apart.mark}: `{other.method}`"
    other_cell = rival(own, found, name, higher=metric["higher"])
    if other_cell is None:
        return result
    left, right = own.by_seed(), other_cell.by_seed()
    by = 100.0 if metric["percent"] else 1.0
    apart = [by * (left[seed] - right[seed]) for seed in sorted(left.keys() & right.keys())]
    if not apart:
        return f"no common seed: `{other_cell.method}`"
    seeds = "a single seed" if len(apart) == 1 else f"{len(apart)} seeds"
    return f"{fmean(apart):+.{digits}f}, {seeds}: `{other_cell.method}`"


def _mean(cell: Cell, part: str, *, higher: bool) -> float:
    """The mean metric at the end, the more the better; the test part stands in for lines without the other."""
    spread = cell.stage("finetuned", part if all(part in record for record in cell.ok) else "test")
    return float("-inf") if spread is None else spread.mean * (1 if higher else -1)


def _n_common(own: Cell, other: Cell) -> int:
    return len(own.by_seed().keys() & other.by_seed().keys())


def _on_equal_terms(own: Cell, other: Cell) -> bool:
    """Whether both were fine-tuned with a teacher, or both without."""
    return own.method.endswith(DISTILLED) == other.method.endswith(DISTILLED)


def _was_asked(own: Cell, found: Sequence[Cell], name: str) -> bool:
    """Whether a rival was asked for at the speed-up of ``own``, and gave no network."""
    return name != STRONGEST and any(
        stands_for(cell.method, name, own.method) and cell.speed_up == own.speed_up for cell in found
    )
