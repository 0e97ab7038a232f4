"""The exceptions of this library. Each message says what was found, where, and what to do about it."""

from __future__ import annotations


class EtpError(Exception):
    """Base class of every error that this library raises on purpose."""


class PlanError(EtpError):
    """A model and a plan do not fit: another model, an already pruned one, another device, nothing to prune."""


class SelectionError(EtpError):
    """A selection names unknown groups, has wrong sizes, or violates a group's constraint."""


class BudgetError(EtpError):
    """A budget is malformed, or no selection of the plan can meet it."""


class EquivalenceError(EtpError):
    """The pruned model does not compute what the masked model computes.

    Attributes:
        group: name of the first group that breaks, or ``None`` where that is not known.
        error: relative error that was measured (``inf`` if the pruned model could not run).
    """

    def __init__(self, message: str, *, group: str | None = None, error: float = float("inf")) -> None:
        super().__init__(message)
        self.group = group
        self.error = error


class ForceError(EtpError, ValueError):
    """A regularizer was configured or attached in a way that cannot work."""


class ScoreError(EtpError, ValueError):
    """A criterion cannot be computed, or scores are not finite."""


class CheckpointError(EtpError):
    """A saved model is damaged, hostile, of an unknown version, or does not fit the given architecture."""
