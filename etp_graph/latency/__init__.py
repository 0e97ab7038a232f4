"""Measure how long a model takes, and predict it for pruned ones."""

from __future__ import annotations

from ._benchmark import Decoding, Latency, WallClock, benchmark
from ._clock import Timer, steady_conditions
from ._decoding import NextToken
from ._layers import record_calls
from ._tables import TimedCosts, preferred_multiple

__all__ = [
    "Decoding",
    "Latency",
    "NextToken",
    "TimedCosts",
    "Timer",
    "WallClock",
    "benchmark",
    "preferred_multiple",
    "record_calls",
    "steady_conditions",
]
