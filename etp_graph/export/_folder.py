"""Folders of transformers: what may be replaced, and writing them whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from etp_graph.checkpoint import move_into_place, restore_backup, storage_errors
from etp_graph.errors import ExportError

_WRITTEN = frozenset(".json .safetensors .txt .model .jinja".split())
"""Endings of the files that transformers and etp_graph.save write."""


def require_free(folder: Path, *, overwrite: bool) -> None:
    """Raise unless the folder is missing, empty, or a model that may be replaced.

    Raises:
        ExportError: the folder holds a model and ``overwrite`` is false, or it holds other files.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ExportError(f"{folder}: is a file or a link, not a folder. Choose another path.")
    held = sorted(folder.iterdir())
    others = [file.name for file in held if file.is_dir() or file.suffix not in _WRITTEN]
    if others or (held and not (folder / "config.json").is_file()):
        raise ExportError(f"{folder}: holds other files ({(others or [held[0].name])[0]!r}). Choose a new folder.")
    if held and not overwrite:
        raise ExportError(f"{folder}: holds a model. Choose another folder, or pass overwrite=True (--overwrite).")


def require_space(folder: Path, n_bytes: int) -> None:
    """Raise :class:`ExportError` unless the disk of the folder has room for so many bytes."""
    place = folder
    while not place.is_dir() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < n_bytes:
        raise ExportError(
            f"{folder}: the model needs {n_bytes / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free. Free space, or "
            "choose another disk; nothing was written."
        )


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new folder beside ``folder``, and move it there. After an error nothing is left of it.

    Raises:
        CheckpointError: it cannot be written.
    """
    with storage_errors(folder):
        restore_backup(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as private:
            new = Path(private) / "new"  # its mode follows the umask; the one of the temporary folder is private
            new.mkdir()
            write(new)
            for file in new.glob("*.safetensors"):
                shutil.copymode(new / "config.json", file)  # safetensors ignores the umask and makes it private
            move_into_place(new, folder)
