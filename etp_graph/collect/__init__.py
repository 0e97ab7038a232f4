"""Record what batches of data say about units."""

from __future__ import annotations

from ._collectors import Observations, activations, gradients, watch
from ._watch_points import silence_

__all__ = [
    "Observations",
    "activations",
    "gradients",
    "silence_",
    "watch",
]
