"""Selections that tests of several packages use."""

from __future__ import annotations

import torch

from etp_graph.plan import Plan, Selection


def without_first_units(plan: Plan) -> Selection:
    """Return the selection that removes the first unit of each group that may be pruned."""
    keep = torch.ones(plan.n_units, dtype=torch.bool)
    for group, span in plan.spans():
        keep[span.start] = group.locked is not None
    return Selection.from_flat(plan, keep)
