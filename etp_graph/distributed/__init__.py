"""Several processes with the same model (DDP): one selection for all of them, and the wrapper anew after surgery.

The force needs nothing from here: it depends on weights and learning rates alone, which are equal on all ranks, so a
:class:`etp_graph.Regularizer` of the bare model on every rank does the same everywhere, without communication.
"""

from __future__ import annotations

from ._agreement import Group, agree_on_selection, first_rank, gather_strings, raise_everywhere, require_group
from ._ddp import prune_, rewrap, rewrap_

__all__ = [
    "Group",
    "agree_on_selection",
    "first_rank",
    "gather_strings",
    "prune_",
    "raise_everywhere",
    "require_group",
    "rewrap",
    "rewrap_",
]
