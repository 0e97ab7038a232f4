"""Prune a folder of transformers without training it, one block of the model in memory at a time."""

from __future__ import annotations

from ._folders import oneshot
from ._run import PrunedFolder, StreamedResult

__all__ = ["PrunedFolder", "StreamedResult", "oneshot"]
