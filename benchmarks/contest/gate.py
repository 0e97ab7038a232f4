"""Refuse a recipe under which the unpruned network loses what it knew.

A recipe that harms the network that is never cut measures how methods get on with a broken network. The dense control
takes the same steps without pruning. At the scales of whole data sets it may lose at most 0.3 points of a metric in
percent against its checkpoint on the validation part, and 1 % of any other. The test part has no say.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.common.contestant_names import UNPRUNED
from benchmarks.common.records import Record
from benchmarks.tasks.base import Recipe, Scale, concerns

GATED: tuple[Scale, ...] = ("full", "paper")
POINTS, SHARE = 0.003, 0.01
"""What the dense control may lose: of a metric in percent, as a fraction; of others, relative to the checkpoint."""


def loss_of(metric: Mapping[str, Any], checkpoint: float, control: float) -> float:
    """By how much the control is worse than its checkpoint, as a fraction (of a metric in percent: points / 100)."""
    lost = checkpoint - control if metric["higher"] else control - checkpoint
    return lost if metric["percent"] else lost / max(abs(checkpoint), 1e-12)


def allowed_loss(metric: Mapping[str, Any]) -> float:
    """What the control may lose, in the unit of :func:`loss_of`."""
    return POINTS if metric["percent"] else SHARE


def refusal_of(metric: Mapping[str, Any], pairs: Iterable[tuple[float, float]]) -> str | None:
    """Why a recipe is refused, from the metrics of checkpoint and control for each seed; ``None``: it is not.

    One control is a noisy measure, so with several seeds their mean loss decides.
    """
    found = list(pairs)
    if not found:
        return None
    lost = statistics.fmean(loss_of(metric, *pair) for pair in found)
    if lost <= allowed_loss(metric):
        return None
    before, after = (statistics.fmean(pair[i] for pair in found) for i in (0, 1))
    by, unit = (100, " points") if metric["percent"] else (1, "")
    shown = f"{100 * lost:.2f}{unit}" if metric["percent"] else f"{100 * lost:.1f} %"
    limit = f"{100 * POINTS:g} points" if metric["percent"] else f"{100 * SHARE:g} %"
    return (
        f"the dense control goes from {by * before:.4g} to {by * after:.4g} {metric['name']} on the validation part "
        f"({len(found)} seed{'s' if len(found) > 1 else ''}): it loses {shown}, {limit} are allowed; find better rates "
        "with `python -m benchmarks contest recipe`"
    )


def controls(records: Iterable[Record], recipe: Mapping[str, Any]) -> list[Record]:
    """The dense controls that were run under a recipe (as in a record)."""
    same = concerns(recipe, UNPRUNED)
    return [
        record for record in records
        if record["config"]["method"] == UNPRUNED and "val" in record and concerns(record["recipe"], UNPRUNED) == same
    ]  # fmt: skip


def refusal(records: Iterable[Record], recipe: Recipe | Mapping[str, Any]) -> str | None:
    """Why a recipe is refused, from the lines of its dense controls; ``None``: it is not, or nobody has looked yet."""
    body = json.loads(json.dumps(asdict(recipe))) if isinstance(recipe, Recipe) else recipe
    found = controls(records, body)
    if not found or found[0]["config"]["scale"] not in GATED:
        return None
    return refusal_of(found[0]["metric"], pairs_of(found))


def pairs_of(found: Iterable[Record]) -> list[tuple[float, float]]:
    """The metrics of checkpoint and control on the validation part, for each line of a control."""
    return [(record["val"]["dense"], record["val"]["finetuned"]) for record in found]


def under_newest_recipe(records: Sequence[Record]) -> list[Record]:
    """The records of one task under the recipe of its newest dense control, so that no table mixes two recipes.

    Scales whose recipes are not judged keep all records.
    """
    found = list(records)
    recipes = [record["recipe"] for record in found if record["config"]["method"] == UNPRUNED]
    if not recipes or found[0]["config"]["scale"] not in GATED:
        return found

    def same(record: Record) -> bool:
        method = record["config"]["method"]
        return concerns(record["recipe"], method) == concerns(recipes[-1], method)

    return [record for record in found if same(record)]
