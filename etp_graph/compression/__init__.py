"""Sparse training, surgery and fine-tuning in one call."""

from __future__ import annotations

from ._compress import budget_of, compress
from ._journal import JOURNAL_FILE, StepResult, read_journal, read_tensors
from ._oneshot import OneShotResult, oneshot_
from ._phase import Phase
from ._result import CompressResult, Round, SpeedUpDiverges
from ._steps import Evaluate, Train

__all__ = [
    "JOURNAL_FILE",
    "CompressResult",
    "Evaluate",
    "OneShotResult",
    "Phase",
    "Round",
    "SpeedUpDiverges",
    "StepResult",
    "Train",
    "budget_of",
    "compress",
    "oneshot_",
    "read_journal",
    "read_tensors",
]
