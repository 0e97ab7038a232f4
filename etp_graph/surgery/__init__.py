"""Remove units from a live model, and the record of it."""

from __future__ import annotations

from ._cuts import WEIGHT_NORM_DIRECTION, Cut, find_cuts, find_optimizer_states
from ._prune import prune_
from ._record import (
    Edit,
    SurgeryRecord,
    get_record,
    read_attribute,
    remove_record,
    replace_data,
    set_record,
    write_attribute,
)

__all__ = [
    "WEIGHT_NORM_DIRECTION",
    "Cut",
    "Edit",
    "SurgeryRecord",
    "find_cuts",
    "find_optimizer_states",
    "get_record",
    "prune_",
    "read_attribute",
    "remove_record",
    "replace_data",
    "set_record",
    "write_attribute",
]
