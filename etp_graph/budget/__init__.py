"""From scores and a budget to the units that stay."""

from __future__ import annotations

from ._allocate import allocate, under_way
from ._budget import Budget, Rank, Scope, check_choice
from ._latency_fit import LatencyMissed

__all__ = [
    "Budget",
    "LatencyMissed",
    "Rank",
    "Scope",
    "allocate",
    "check_choice",
    "under_way",
]
