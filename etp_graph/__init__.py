"""Structured pruning on dependency groups with Exponential Torque Pruning: trace, verify, train, prune, save."""

from __future__ import annotations

from importlib import metadata as _metadata

from etp_graph import collect, criteria, depth, export, forces, methods, recovery, schedules
from etp_graph.budget import Budget, LatencyMissed, allocate
from etp_graph.checkpoint import load, save
from etp_graph.compression import (
    CompressResult,
    OneShotResult,
    Phase,
    PrunedFolder,
    SpeedUpDiverges,
    StreamedResult,
    compress,
    oneshot,
    oneshot_,
)
from etp_graph.errors import (
    BudgetError,
    CheckpointError,
    EquivalenceError,
    EtpError,
    ExportError,
    ForceError,
    PlanError,
    ScoreError,
    SelectionError,
    SettingError,
)
from etp_graph.graph import UnprunableAttention, trace
from etp_graph.latency import Latency, benchmark
from etp_graph.model import register_padding
from etp_graph.plan import Attribute, Cost, Group, LatencyFit, Op, Plan, Selection, Slice, cost
from etp_graph.regularizer import Regularizer
from etp_graph.standins import register_standin
from etp_graph.surgery import prune_
from etp_graph.verification import Verification, verify

__all__ = [
    "Attribute",
    "Budget",
    "BudgetError",
    "CheckpointError",
    "CompressResult",
    "Cost",
    "EquivalenceError",
    "EtpError",
    "ExportError",
    "ForceError",
    "Group",
    "Latency",
    "LatencyFit",
    "LatencyMissed",
    "OneShotResult",
    "Op",
    "Phase",
    "Plan",
    "PlanError",
    "PrunedFolder",
    "Regularizer",
    "ScoreError",
    "Selection",
    "SelectionError",
    "SettingError",
    "Slice",
    "SpeedUpDiverges",
    "StreamedResult",
    "UnprunableAttention",
    "Verification",
    "allocate",
    "benchmark",
    "collect",
    "compress",
    "cost",
    "criteria",
    "depth",
    "export",
    "forces",
    "load",
    "methods",
    "oneshot",
    "oneshot_",
    "prune_",
    "recovery",
    "register_padding",
    "register_standin",
    "save",
    "schedules",
    "trace",
    "verify",
]


def _installed_version() -> str:
    try:
        return _metadata.version("etp-graph")
    except _metadata.PackageNotFoundError:  # a checkout that was never installed
        return "0+unknown"


__version__ = _installed_version()


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
