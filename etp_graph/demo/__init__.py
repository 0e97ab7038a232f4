"""Small networks, real data and a plain training loop: what ``etp-graph demo`` and the benchmarks run on."""

from __future__ import annotations

from ._results import DemoConfig, DemoResult
from ._run import run_demo

__all__ = [
    "DemoConfig",
    "DemoResult",
    "run_demo",
]
