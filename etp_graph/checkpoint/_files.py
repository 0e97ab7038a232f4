"""Write files whole or not at all, keep backups while they are replaced, and read files of bounded size."""

from __future__ import annotations

import os
import shutil
import stat
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from etp_graph.errors import CheckpointError

from ._exchange import exchange
from ._temporary import temporary_beside

T = TypeVar("T")

_ATTEMPTS = 100
"""How often a folder is read that another process replaces all the time."""

_PATIENCE = 20
"""How often a folder is looked for that another process is replacing, in hundredths of a second."""

FAILURES: tuple[type[BaseException], ...] = (OSError, SafetensorError, RuntimeError)
"""What the disk and safetensors raise if a file cannot be written."""


@contextmanager
def storage_errors(
    place: Path,
    *,
    action: str = "written",
    remedy: str = "Check space and permissions there; what was there before is still there.",
    failures: tuple[type[BaseException], ...] = FAILURES,
) -> Iterator[None]:
    """Raise failures inside the context as :class:`CheckpointError`.

    Args:
        place: file or folder that the error names.
        action: what cannot be done, as a past participle.
        remedy: sentence that says what to do.
        failures: the exceptions to replace; all others pass.
    """
    try:
        yield
    except failures as error:
        raise CheckpointError(f"{place}: cannot be {action} ({error}). {remedy}") from error


def restore_backup(folder: Path) -> None:
    """Restore the previous checkpoint from its backup name, if a save stopped between its two renames."""
    if not os.path.lexists(folder) and os.path.lexists(backup_of(folder)):
        backup_of(folder).rename(folder)


def move_into_place(new: Path, folder: Path) -> None:
    """Wait until the new checkpoint is on the disk, and move it to its place.

    The system exchanges an existing folder with the new one in one step, so that a reader always finds one of them. The
    name ``new`` then holds the existing one, which is removed. Where the system cannot do that, the existing folder is
    first renamed to its backup name, because a rename cannot replace a folder that is not empty.
    """
    sync_folder(new)
    backup = backup_of(folder)
    with ExitStack() as undo:  # what undoes a step is written down before it, because a signal may come in between
        if not os.path.lexists(folder):
            undo.callback(_move_unless_there, folder, new)
            new.rename(folder)
        elif exchange(new, folder):
            undo.callback(exchange, new, folder)
        else:
            shutil.rmtree(backup, ignore_errors=True)  # left by a save that stopped after its second rename
            undo.callback(restore_backup, folder)
            folder.rename(backup)
            undo.callback(_move_unless_there, folder, new)
            new.rename(folder)
        fsync(folder.parent)
        undo.pop_all()
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(backup, ignore_errors=True)


def _move_unless_there(path: Path, to: Path) -> None:
    if not os.path.lexists(to):
        path.rename(to)


def fsync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the files of a folder without subfolders, and its entries, are on the disk."""
    for path in (*folder.iterdir(), folder):
        fsync(path)


def replace_file(file: Path, content: bytes) -> None:
    """Write a file atomically: completely, or not at all. Raises ``OSError``; see :func:`storage_errors`."""
    with temporary_beside(file) as temporary:
        temporary.write_bytes(content)
        fsync(temporary)
        temporary.replace(file)


RESTORE = "Restore the folder from a copy, or save the model again."


def backup_of(folder: Path) -> Path:
    """Return the name of the folder that holds the existing checkpoint while a new one replaces it."""
    return folder.with_name(f".{folder.name}.previous")


def locate_folder(path: str | os.PathLike[str], *, stacklevel: int = 3) -> Path:
    """Return the folder to read: the backup of the old checkpoint if a save stopped between its two renames."""
    folder = Path(path).absolute()
    for _ in range(_PATIENCE):
        if os.path.lexists(folder) or not os.path.lexists(backup_of(folder)):
            return folder
        time.sleep(0.01)  # a process that lives makes the second rename at once
    warnings.warn(
        f"{folder} was being overwritten when the process ended: reading the former one.", stacklevel=stacklevel
    )
    return backup_of(folder)


def read_stable(path: str | os.PathLike[str], read: Callable[[Path], T]) -> T:
    """Return what ``read`` returns for a folder; read again if another process replaced the folder meanwhile.

    The manifest and the weights may otherwise come from two checkpoints, which do not fit each other.

    Raises:
        CheckpointError: ``read`` raised it for a folder that nobody changed meanwhile.
    """
    for attempt in range(_ATTEMPTS):
        folder = locate_folder(path, stacklevel=4)
        before = _identity(folder)
        try:
            return read(folder)
        except CheckpointError:
            if attempt == _ATTEMPTS - 1 or before == _identity(locate_folder(path, stacklevel=4)):
                raise
    raise AssertionError("the last attempt returns or raises")


def _identity(folder: Path) -> tuple[object, ...]:
    """Return what changes when a folder or one of its files is replaced."""
    try:
        own = folder.stat()
        held = sorted((e.name, e.stat(follow_symlinks=False)) for e in os.scandir(folder))
    except (OSError, ValueError) as error:  # a path with a zero byte
        return (type(error),)
    files = ((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in held)
    return (own.st_dev, own.st_ino, own.st_ctime_ns, *files)


def require_folder(folder: Path) -> None:
    """Raise :class:`CheckpointError` if a link or a file has the name of a folder; a link could lead anywhere."""
    if os.path.lexists(folder) and not stat.S_ISDIR(os.lstat(folder).st_mode):
        raise CheckpointError(f"{folder}: is a link or a file, not a folder. {RESTORE}")


def open_file(file: Path) -> BufferedReader:
    """Open a regular file to read; links are not followed. Raises :class:`CheckpointError`."""
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):  # not every system has all of them
        flags |= getattr(os, name, 0)
    try:
        if not stat.S_ISREG(os.lstat(file).st_mode):
            raise CheckpointError(f"{file}: not a regular file (a link, folder or device). Put the file itself there.")
        return os.fdopen(os.open(file, flags), "rb")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}). Name a folder that etp_graph.save wrote.") from error


def read_file(file: Path, *, limit: int) -> bytes:
    """Read a regular file of at most ``limit`` bytes; links are not followed. Raises :class:`CheckpointError`."""
    with storage_errors(file, action="read", remedy=RESTORE, failures=(OSError,)), open_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise CheckpointError(f"{file}: {size} bytes where at most {limit} are expected. {RESTORE}")
        data = stream.read(size + 1)
    if len(data) != size:
        raise CheckpointError(f"{file}: changed while it was read. Load it again once the writer has finished.")
    return data
