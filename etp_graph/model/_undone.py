"""Undo something at the end of a context, whatever interrupts the undoing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle

_ATTEMPTS = 5
"""Number of exceptions in a row after which undoing is given up. An interrupt from outside is one."""


@contextmanager
def undone(undo: Callable[[], object]) -> Iterator[None]:
    """Call ``undo`` when the context ends, also after an exception.

    An interrupt (Ctrl-C) or a lack of memory may arrive in the middle of the undoing. It is then begun again, and the
    exception is raised afterwards.

    Args:
        undo: must be right if it runs twice, or runs after a part of it.
    """
    done = False

    def finish() -> None:
        nonlocal done
        if not done:
            undo()
            done = True

    try:
        try:
            yield
        finally:
            _until_finished(finish)
    finally:
        _until_finished(finish)  # an interrupt may arrive between the end of the block and the call above


@contextmanager
def removing_hooks() -> Iterator[list[RemovableHandle]]:
    """Yield a list for handles of hooks. All of them are removed when the context ends."""
    handles: list[RemovableHandle] = []

    def remove() -> None:
        for handle in handles:
            handle.remove()

    with undone(remove):
        yield handles


def _until_finished(finish: Callable[[], object]) -> None:
    """Call ``finish`` until it comes to its end, and raise the last exception afterwards."""
    late: BaseException | None = None
    for _ in range(_ATTEMPTS):
        try:
            finish()
            break
        except BaseException as error:  # noqa: BLE001 - raised below, after the undoing
            late = error
    if late is not None:
        raise late
