"""Remove units from a live model, and the record of it."""

from __future__ import annotations

from ._blocks import DENSE_CONFIG, prepare_block_removal
from ._commit import PreparedChanges, hold_signals, writing
from ._cuts import WEIGHT_NORM_DIRECTION, Cut, find_cuts
from ._optimizer_states import OnUncuttable, Optimizers, list_optimizers, require_full_shapes
from ._prepare import bare_copies, list_copies
from ._prune import prepare_surgery, prune_
from ._record import (
    Edit,
    SurgeryRecord,
    current_record,
    get_record,
    read_attribute,
    replace_data,
    set_record,
    swap_record,
    was_pruned_alone,
    write_attribute,
)
from ._rehearsal import rehearse_cut, require_cuttable

__all__ = [
    "DENSE_CONFIG",
    "WEIGHT_NORM_DIRECTION",
    "Cut",
    "Edit",
    "OnUncuttable",
    "Optimizers",
    "PreparedChanges",
    "SurgeryRecord",
    "bare_copies",
    "current_record",
    "find_cuts",
    "get_record",
    "hold_signals",
    "list_copies",
    "list_optimizers",
    "prepare_block_removal",
    "prepare_surgery",
    "prune_",
    "read_attribute",
    "rehearse_cut",
    "replace_data",
    "require_cuttable",
    "require_full_shapes",
    "set_record",
    "swap_record",
    "was_pruned_alone",
    "write_attribute",
    "writing",
]
