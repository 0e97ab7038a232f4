"""Let two queues side by side never take the same run.

A lock is a file with the number of the process that holds it. The operating system locks the file for that process and
lets it go when the process dies, however it dies: the next queue takes over what a dead process left.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def hold_lock(folder: Path, name: str) -> Iterator[bool]:
    """Try to take a lock; the value says whether this process has it while the context lasts.

    Args:
        folder: of the locks.
        name: of what is locked, a plain word.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.lock"
    descriptor = _take(path)
    if descriptor is None:
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)  # lets the lock go


def holder(folder: Path, name: str) -> int | None:
    """The number of the process that holds a lock; ``None``: nobody does."""
    path = folder / f"{name}.lock"
    try:
        with path.open() as file:
            if _lock(file.fileno(), shared=True):
                return None  # a dead process left the file
            return int(file.read() or 0)
    except (FileNotFoundError, ValueError):
        return None


def _take(path: Path) -> int | None:
    """The open and locked file; ``None``: another process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    # Between opening and locking, its holder may have finished and removed the file: then this lock is of no file.
    if _lock(descriptor) and path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        return descriptor
    os.close(descriptor)
    return None


def _lock(descriptor: int, *, shared: bool = False) -> bool:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
