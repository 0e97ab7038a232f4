"""Save and load pruned models without pickle."""

from __future__ import annotations

from ._checkpoint import describe_model, load, read_weights, save, save_into
from ._files import locate_folder, move_into_place, read_file, replace_file, restore_backup, storage_errors
from ._manifest import DTYPES, MANIFEST_FILE, WEIGHTS_FILE, Manifest, parse_manifest, read_manifest
from ._restore import restore_

__all__ = [
    "DTYPES",
    "MANIFEST_FILE",
    "WEIGHTS_FILE",
    "Manifest",
    "describe_model",
    "load",
    "locate_folder",
    "move_into_place",
    "parse_manifest",
    "read_file",
    "read_manifest",
    "read_weights",
    "replace_file",
    "restore_",
    "restore_backup",
    "save",
    "save_into",
    "storage_errors",
]
