"""Temporary names beside files and folders that are written, and removal of those that dead processes left."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_OWNER = re.compile(r"(?P<machine>[0-9a-f]{8})-(?P<pid>[0-9]{1,9})-(?P<start>[0-9]+)-[0-9a-f]{8}")

_WITHOUT_OWNER = re.compile(r"[0-9a-f]{16}")  # names that version 0.1.0 gave

_UNKNOWN_OWNER_SECONDS = 24 * 3600
"""Age at which something is removed whose process cannot be asked, because it ran on another machine."""

_active: set[str] = set()


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Give an unused hidden name beside ``path`` for its new content, and remove at the end what is there then.

    A process that is killed cannot remove anything, so the name says which process it belongs to. The next one that
    writes ``path`` removes what dead processes left.
    """
    remove_stale(path)
    temporary = path.with_name(
        f".{path.name}.{_machine()}-{os.getpid()}-{_start(os.getpid())}-{secrets.token_hex(4)}.tmp"
    )
    _active.add(temporary.name)
    try:
        yield temporary
    finally:
        _active.discard(temporary.name)
        _remove(temporary)


def remove_stale(path: Path) -> None:
    """Remove what processes left beside ``path`` that were killed while they wrote it."""
    prefix, suffix = f".{path.name}.", ".tmp"
    try:
        found = [entry.name for entry in os.scandir(path.parent)]
    except OSError:
        return  # whoever writes there raises the error
    for name in found:
        if name.startswith(prefix) and name.endswith(suffix):
            temporary = path.with_name(name)
            if _is_stale(temporary, name[len(prefix) : -len(suffix)]):
                _remove(temporary)


def _remove(temporary: Path) -> None:
    try:
        temporary.unlink(missing_ok=True)
    except OSError:  # a folder
        shutil.rmtree(temporary, ignore_errors=True)


def _is_stale(temporary: Path, owner: str) -> bool:
    named = _OWNER.fullmatch(owner)
    if named is None and not _WITHOUT_OWNER.fullmatch(owner):
        return False  # not a name that this library gives
    if named is not None and named["machine"] == _machine() and os.name != "nt":
        pid, start = int(named["pid"]), int(named["start"])
        mine = pid == os.getpid() and start == _start(pid)
        return temporary.name not in _active if mine else not _is_alive(pid, start)
    try:
        files = [temporary, *temporary.iterdir()] if temporary.is_dir() else [temporary]
        newest = max(os.lstat(file).st_mtime for file in files)
    except OSError:
        return False  # its owner is removing it
    return time.time() - newest > _UNKNOWN_OWNER_SECONDS


def _is_alive(pid: int, start: int) -> bool:
    """Return True if the process that began at this time still runs; another one may have its number by now."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # it belongs to another user
    return start == 0 or _start(pid) == start


def _start(pid: int) -> int:
    """Return when a process began, in the units of Linux since the start of the machine.

    Zero stands for a system that does not tell, or for a process that has ended and only waits for its parent.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return 0 if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, ValueError, IndexError):
        return 0


@cache
def _machine() -> str:
    """Return a short name of the machine or container, within which numbers of processes are unique."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]
