"""From a model and example inputs to its plan: labels of the units travel through one forward pass."""

from __future__ import annotations

from ._refusals import require_plan_alone
from ._torch_pruning import plan_from_depgraph
from ._trace import trace
from ._warnings import UnprunableAttention

__all__ = [
    "UnprunableAttention",
    "plan_from_depgraph",
    "require_plan_alone",
    "trace",
]
