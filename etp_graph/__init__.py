"""Structured pruning on dependency groups with Exponential Torque Pruning: trace, prove, train sparse, prune, save."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from . import criteria, forces, schedules
from .allocate import allocate
from .budget import Budget
from .checkpoint import load, save
from .costs import Cost, cost
from .errors import (
    BudgetError,
    CheckpointError,
    EquivalenceError,
    EtpError,
    ForceError,
    PlanError,
    ScoreError,
    SelectionError,
)
from .layers import register_padding
from .plan import Attribute, Group, Op, Plan, Selection, Slice
from .regularizer import Regularizer
from .surgery import prune_
from .tracing import trace
from .verify import Verification, verify

try:
    __version__ = version("etp-graph")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Attribute",
    "Budget",
    "BudgetError",
    "CheckpointError",
    "Cost",
    "EquivalenceError",
    "EtpError",
    "ForceError",
    "Group",
    "Op",
    "Plan",
    "PlanError",
    "Regularizer",
    "ScoreError",
    "Selection",
    "SelectionError",
    "Slice",
    "Verification",
    "allocate",
    "cost",
    "criteria",
    "forces",
    "load",
    "prune_",
    "register_padding",
    "save",
    "schedules",
    "trace",
    "verify",
]
