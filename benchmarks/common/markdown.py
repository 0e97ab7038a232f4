"""Write pieces of Markdown that all pages share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.common.statistics import Spread


def as_row(values: Iterable[object]) -> str:
    """Return a row of a table."""
    return "| " + " | ".join(str(value).replace("|", "/") for value in values) + " |"


def with_spread(spread: Spread | None, metric: Mapping[str, Any]) -> str:
    """Return mean and deviation in the unit of the metric; a dash without values."""
    return "-" if spread is None else spread.text(percent=metric["percent"], digits=2 if metric["percent"] else 3)
