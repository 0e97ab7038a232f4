"""Exceptions of this library. Each message says what was found, where, and how to correct it."""

from __future__ import annotations

MESSAGE_LENGTH = 2_000
"""Most characters of a message. A damaged file may hold names of millions of characters, which no log should repeat."""


class EtpError(Exception):
    """Base class of every error that this library raises on purpose.

    A message of more than 2,000 characters loses its middle. The place stands at its beginning and
    the remedy at its end.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(_without_middle(one) if isinstance(one, str) else one for one in args))


def _without_middle(text: str) -> str:
    if len(text) <= MESSAGE_LENGTH:
        return text
    left_out = len(text) - MESSAGE_LENGTH + 100
    start = (MESSAGE_LENGTH - 100) // 2
    return f"{text[:start]} [{left_out:,} characters left out] {text[start + left_out :]}"


class PlanError(EtpError):
    """A plan does not fit a model (another model, pruned before, another device), or it has nothing to prune."""


class SelectionError(EtpError):
    """A selection names unknown groups, has wrong sizes, or violates a group's constraint."""


class BudgetError(EtpError):
    """A budget is malformed, or no selection of the plan can meet it."""


class EquivalenceError(EtpError):
    """The outputs or gradients of the pruned model differ from those of the masked model.

    Attributes:
        group: name of the first group that fails, or ``None`` if it is unknown.
        error: measured relative error (``inf`` if the pruned model could not run).
    """

    def __init__(self, message: str, *, group: str | None = None, error: float = float("inf")) -> None:
        super().__init__(message)
        self.group = group
        self.error = error


class SettingError(EtpError, ValueError):
    """A setting is out of range, a name is unknown or taken, or JSON does not hold a configuration."""


class ForceError(SettingError):
    """A force, schedule, method or regularizer has settings or a state that cannot work, or cannot be attached."""


class ScoreError(EtpError, ValueError):
    """A criterion cannot be computed, or scores are not finite."""


class CheckpointError(EtpError):
    """A model cannot be saved; or a saved model is damaged, malicious, of an unknown version, or does not fit."""


class ExportError(EtpError):
    """A pruned model cannot be written in the format of another library; the message says which selection can."""
