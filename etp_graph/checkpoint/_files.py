"""Write files whole or not at all, keep backups while they are replaced, and read files of bounded size."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError

from etp_graph.errors import CheckpointError

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

    A rename cannot replace a folder that is not empty, so an existing folder is first renamed to its backup name.
    """
    sync_folder(new)
    backup = backup_of(folder)
    with ExitStack() as undo:
        if os.path.lexists(folder):
            shutil.rmtree(backup, ignore_errors=True)  # left by a save that stopped after its second rename
            folder.rename(backup)
            undo.callback(backup.rename, folder)
        new.rename(folder)
        undo.callback(folder.rename, new)
        fsync(folder.parent)
        undo.pop_all()
    shutil.rmtree(backup, ignore_errors=True)


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


def temporary_name(path: Path) -> Path:
    """Return an unused hidden name beside ``path``, under which its new content is written first."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def replace_file(file: Path, content: bytes) -> None:
    """Write a file atomically: completely, or not at all. Raises ``OSError``; see :func:`storage_errors`."""
    temporary = temporary_name(file)
    try:
        temporary.write_bytes(content)
        fsync(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


RESTORE = "Restore the folder from a copy, or save the model again."


def backup_of(folder: Path) -> Path:
    """Return the name of the folder that holds the existing checkpoint while a new one replaces it."""
    return folder.with_name(f".{folder.name}.previous")


def locate_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder to read: the backup of the old checkpoint if a save stopped between its two renames."""
    folder = Path(path).absolute()
    if os.path.lexists(folder) or not os.path.lexists(backup_of(folder)):
        return folder
    warnings.warn(f"{folder} was being overwritten when the process ended: reading the former one.", stacklevel=3)
    return backup_of(folder)


def read_file(file: Path, *, limit: int) -> bytes:
    """Read a regular file of at most ``limit`` bytes; links are not followed. Raises :class:`CheckpointError`."""
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):  # not every system has all of them
        flags |= getattr(os, name, 0)
    try:
        if not stat.S_ISREG(os.lstat(file).st_mode):
            raise CheckpointError(f"{file}: not a regular file (a link, folder or device). Put the file itself there.")
        with os.fdopen(os.open(file, flags), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > limit:
                raise CheckpointError(f"{file}: {size} bytes where at most {limit} are expected. {RESTORE}")
            data = stream.read(size + 1)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}). Name a folder that etp_graph.save wrote.") from error
    if len(data) != size:
        raise CheckpointError(f"{file}: changed while it was read. Load it again once the writer has finished.")
    return data
