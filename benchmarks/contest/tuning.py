"""Which strengths are tried: the same number for every contestant, and further ones beyond an edge that wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common.contestant_names import DISTILLED, SMALL
from benchmarks.contest.contestants import RATES
from benchmarks.tasks.base import Metric, Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A strength that was tried.

    Attributes:
        push: the push, or a multiple of the learning rate.
        value: the metric on the validation part; ``None``: training failed.
        reason: why it failed.
        seconds: what the trial took; 0 in lines from before this was kept.
    """

    push: float
    value: float | None
    reason: str | None = None
    seconds: float = 0.0


def grid(recipe: Recipe, method: str) -> tuple[float, ...]:
    """The pushes that every contestant tries, or the learning rates of a network with fresh weights."""
    return RATES if method.removesuffix(DISTILLED) == SMALL else recipe.pushes


def best_trial(trials: Sequence[Trial], metric: Metric) -> Trial | None:
    """The best trial; of equal ones the weakest. ``None``: training failed in all."""
    best: Trial | None = None
    for trial in sorted(trials, key=lambda one: one.push):
        if trial.value is None:
            continue
        if best is None or best.value is None or metric.better(trial.value, best.value):
            best = trial
    return best


def missing_pushes(trials: Sequence[Trial], recipe: Recipe, method: str, metric: Metric) -> list[float]:
    """The pushes to try next; none: all are tried.

    First comes the grid, in any order. While the best trial lies at an edge, one push beyond that edge follows, at the
    ratio of the two last ones, at most ``recipe.extensions`` times. A grid of one push has no edge.
    """
    own = grid(recipe, method)
    tried = {trial.push for trial in trials}
    missing = [push for push in own if push not in tried]
    if missing:
        return missing
    best = best_trial(trials, metric)
    if best is None or len(own) < 2 or len(tried) >= len(own) + recipe.extensions:
        return []
    ordered = sorted(tried)
    if best.push == ordered[-1]:
        return [round(ordered[-1] * ordered[-1] / ordered[-2], 6)]
    if best.push == ordered[0]:
        return [round(ordered[0] * ordered[0] / ordered[1], 6)]
    return []
