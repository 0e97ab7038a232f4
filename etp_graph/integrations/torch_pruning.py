"""Plans from Torch-Pruning's dependency graph."""

from __future__ import annotations

from etp_graph.graph import plan_from_depgraph

__all__ = ["plan_from_depgraph"]
