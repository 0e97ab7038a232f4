"""Sparse training, surgery and fine-tuning in one call."""

from __future__ import annotations

from ._blend import choose_blend, distance_from
from ._compress import budget_of, compress
from ._oneshot import OneShotResult, oneshot_
from ._phase import Phase
from ._result import CompressResult, Round, SpeedUpDiverges
from ._step_files import JOURNAL_FILE, StepResult, model_folder, read_journal, read_plan, read_tensors
from ._steps import Evaluate, Train
from .streamed import PrunedFolder, StreamedResult, oneshot

__all__ = [
    "JOURNAL_FILE",
    "CompressResult",
    "Evaluate",
    "OneShotResult",
    "Phase",
    "PrunedFolder",
    "Round",
    "SpeedUpDiverges",
    "StepResult",
    "StreamedResult",
    "Train",
    "budget_of",
    "choose_blend",
    "compress",
    "distance_from",
    "model_folder",
    "oneshot",
    "oneshot_",
    "read_journal",
    "read_plan",
    "read_tensors",
]
