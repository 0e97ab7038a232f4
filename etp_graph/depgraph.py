"""The old place of :func:`etp_graph.integrations.torch_pruning.plan_from_depgraph`."""

from __future__ import annotations

import warnings

from etp_graph.graph import plan_from_depgraph

__all__ = ["plan_from_depgraph"]

warnings.warn(
    "etp_graph.depgraph has moved to etp_graph.integrations.torch_pruning; this name goes with the next release.",
    DeprecationWarning,
    stacklevel=2,
)
