"""Flat vectors over the units of a live model."""

from __future__ import annotations

from ._kernels import at_least_float32
from ._ranking import Rankings
from ._vectors import Units

__all__ = [
    "Rankings",
    "Units",
    "at_least_float32",
]
