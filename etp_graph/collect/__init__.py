"""Record what batches of data say about units."""

from __future__ import annotations

import warnings
from typing import Any

from ._batches import naming_batch
from ._collectors import Observations, UnwatchedGroups, activations, gradients, watch
from ._divergence import Divergence, IncomparableOutputsError, OutputError, loss_growth, returns_logits
from ._own_labels import OwnLabels
from ._packed_points import PackedPoint
from ._statistics import OBSERVED, BackwardStatistic, Observed, RunningMean, Statistic, needs_backward
from ._watch_points import WatchPoint, filters_only, out_axis, positions_by_width, silence_, unwatched_groups

__all__ = [
    "OBSERVED",
    "BackwardStatistic",
    "Divergence",
    "IncomparableOutputsError",
    "Observations",
    "Observed",
    "OutputError",
    "OwnLabels",
    "PackedPoint",
    "RunningMean",
    "Statistic",
    "UnwatchedGroups",
    "WatchPoint",
    "activations",
    "filters_only",
    "gradients",
    "loss_growth",
    "naming_batch",
    "needs_backward",
    "out_axis",
    "positions_by_width",
    "returns_logits",
    "silence_",
    "unwatched_groups",
    "watch",
]


def __getattr__(name: str) -> Any:
    """Return :class:`Observations` under its name of version 0.1.0."""
    if name != "Record":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("collect.Record is now collect.Observations", DeprecationWarning, stacklevel=2)
    return Observations
