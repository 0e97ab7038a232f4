"""Structured pruning on dependency groups with Exponential Torque Pruning: trace, verify, train, prune, save."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from . import collect, criteria, forces, methods, schedules
from .adapters import register_standin
from .advice import UnprunableAttention
from .allocate import allocate
from .budget import Budget
from .checkpoint import load, save
from .compress import CompressResult, compress
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
from .latency import Latency, benchmark
from .latency_fit import LatencyFit, LatencyMissed
from .layers import register_padding
from .outcome import SpeedUpDiverges
from .phases import Phase
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
    "CompressResult",
    "Cost",
    "EquivalenceError",
    "EtpError",
    "ForceError",
    "Group",
    "Latency",
    "LatencyFit",
    "LatencyMissed",
    "Op",
    "Phase",
    "Plan",
    "PlanError",
    "Regularizer",
    "ScoreError",
    "Selection",
    "SelectionError",
    "Slice",
    "SpeedUpDiverges",
    "UnprunableAttention",
    "Verification",
    "allocate",
    "benchmark",
    "collect",
    "compress",
    "cost",
    "criteria",
    "forces",
    "load",
    "methods",
    "prune_",
    "register_padding",
    "register_standin",
    "save",
    "schedules",
    "trace",
    "verify",
]
