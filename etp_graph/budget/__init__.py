"""From scores and a budget to the units that stay."""

from __future__ import annotations

from etp_graph.plan import QUANTITIES, Quantity

from ._allocate import allocate, under_way
from ._budget import Budget, Rank, Scope, Targets, show_targets
from ._latency_fit import LatencyMissed
from ._register import register, register_quantity

__all__ = [
    "QUANTITIES",
    "Budget",
    "LatencyMissed",
    "Quantity",
    "Rank",
    "Scope",
    "Targets",
    "allocate",
    "register",
    "register_quantity",
    "show_targets",
    "under_way",
]
