"""Commit prepared changes as one: all of them, or none after any exception.

A signal is held back during a commit. Its handler runs afterwards, so Ctrl-C finds a model that is pruned as a whole.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

_ATTEMPTS = 5
"""Number of exceptions in a row after which undoing one change is given up. An interrupt from outside is one."""


@dataclass(frozen=True, slots=True)
class Change:
    """One prepared change.

    Attributes:
        apply: make the change. All values that it writes exist already.
        undo: write what was there before. It must also be right if ``apply`` did not run, or not to its end.
    """

    apply: Callable[[], object]
    undo: Callable[[], object]


def writing(tensor: Tensor, values: Tensor) -> Change:
    """Return the change of all values of a tensor, which stays the same object and keeps its shape."""
    target, old = tensor.detach(), tensor.detach().clone()
    return Change(lambda: target.copy_(values), lambda: target.copy_(old))


class PreparedChanges:
    """Changes of which everything is ready: checks are done, and all new tensors exist. Nothing has changed yet.

    Args:
        changes: in the order in which they are made.
    """

    def __init__(self, changes: Sequence[Change]) -> None:
        self._changes = changes

    def commit(self) -> None:
        """Make all changes. If an exception interrupts it, nothing has changed."""
        commit_changes(self._changes)

    def undo(self) -> None:
        """Undo a commit: everything is as before. Without a commit it does nothing."""
        undo_changes(self._changes)


def commit_changes(changes: Sequence[Change]) -> None:
    """Apply all changes; after any exception undo them all and raise it.

    Raises:
        BaseException: what a change raised, or what interrupted it. Nothing has changed then. An interrupt by a signal
            is raised after the last change, and everything has changed then.
    """
    hold_signals(lambda: _apply(changes))


def hold_signals(action: Callable[[], object]) -> None:
    """Run an action while handlers of signals wait. They run afterwards, and may raise (``KeyboardInterrupt``)."""
    signals = _HeldSignals()
    try:
        try:
            signals.hold()
            action()
        finally:
            signals.release()
    finally:
        signals.release()
        signals.deliver()


def _apply(changes: Sequence[Change]) -> None:
    def apply() -> None:
        for change in changes:
            change.apply()

    try:
        _without_modes(apply)
    except BaseException:
        undo_changes(changes)
        raise


def _without_modes(action: Callable[[], object]) -> None:
    """Run an action that function modes of PyTorch, which are active outside, neither see nor refuse.

    An exception may arrive between the end of a ``with`` block and its exit, and would leave the modes off for good.
    The exit therefore stands in two blocks. A second exit does nothing new.
    """
    off: Any = torch._C.DisableTorchFunction()
    try:
        try:
            off.__enter__()
            action()
        finally:
            off.__exit__(None, None, None)
    finally:
        off.__exit__(None, None, None)


def undo_changes(changes: Sequence[Change]) -> None:
    """Undo all changes, the last one first. Further exceptions are raised when everything else is undone."""
    pending, late, failures = list(changes), list[BaseException](), 0

    def undo() -> None:
        nonlocal failures
        while pending:
            pending[-1].undo()
            pending.pop()
            failures = 0

    while pending:
        try:
            _without_modes(undo)
        except BaseException as error:  # noqa: BLE001 - raised below, after the rest is undone
            late.append(error)
            failures += 1
            if failures > _ATTEMPTS:
                pending.pop()
    if late:
        raise late[-1]


@dataclass(slots=True)
class _HeldSignals:
    """Signals that arrive during a commit. Only the main thread gets any."""

    _handlers: dict[int, Any] = field(default_factory=dict)
    _arrived: list[tuple[int, FrameType | None]] = field(default_factory=list)

    def hold(self) -> None:
        """Replace all handlers that are Python functions, which may raise, until :meth:`release`."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in sorted(signal.valid_signals()):
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                try:
                    signal.signal(number, self._note)
                except ValueError:  # a main thread of another interpreter than the main one
                    del self._handlers[number]

    def release(self) -> None:
        """Put the handlers back. A second call does nothing new."""
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)

    def deliver(self) -> None:
        """Call the handlers of the signals that arrived."""
        while self._arrived:
            number, frame = self._arrived.pop(0)
            self._handlers[number](number, frame)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._arrived.append((number, frame))
        if not _is_held(frame):  # an exception kept release() from running
            self.release()
            self.deliver()


def _is_held(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code is hold_signals.__code__:
            return True
        frame = frame.f_back
    return False
