"""The vocabulary: slices, groups, plans, selections and what they cost."""

from __future__ import annotations

from ._cost import Cost
from ._costs import CostModel, Ints, cost
from ._groups import MAX_UNITS, Attribute, Group, Index, Slice, as_index, as_tensor
from ._kinds import KINDS, ON_REQUEST, chosen_kinds, lock_other_kinds
from ._plan import Op, Plan, name_norm
from ._plan_json import ACTIVATION
from ._positions import NO_UNIT, Positions, SlicedAxis, numbers_per_unit, with_no_unit
from ._quantities import (
    QUANTITIES,
    Quantity,
    Target,
    Terms,
    add_quantity,
    counted_quantities,
    described_quantity,
    find_quantity,
    find_target,
    known_targets,
    memory_quantity,
    whole_axes,
)
from ._reasons import add_line, without_line
from ._selection import LatencyFit, Selection, parse_selection
from ._table import cost_table

__all__ = [
    "ACTIVATION",
    "KINDS",
    "MAX_UNITS",
    "NO_UNIT",
    "ON_REQUEST",
    "QUANTITIES",
    "Attribute",
    "Cost",
    "CostModel",
    "Group",
    "Index",
    "Ints",
    "LatencyFit",
    "Op",
    "Plan",
    "Positions",
    "Quantity",
    "Selection",
    "Slice",
    "SlicedAxis",
    "Target",
    "Terms",
    "add_line",
    "add_quantity",
    "as_index",
    "as_tensor",
    "chosen_kinds",
    "cost",
    "cost_table",
    "counted_quantities",
    "described_quantity",
    "find_quantity",
    "find_target",
    "known_targets",
    "lock_other_kinds",
    "memory_quantity",
    "name_norm",
    "numbers_per_unit",
    "parse_selection",
    "whole_axes",
    "with_no_unit",
    "without_line",
]
