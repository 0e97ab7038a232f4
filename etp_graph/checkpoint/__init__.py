"""Save and load pruned models without pickle."""

from __future__ import annotations

from ._architecture import import_transformers, read_plain_config
from ._checkpoint import describe_model, load, save, save_into
from ._files import (
    locate_folder,
    move_into_place,
    read_file,
    read_stable,
    replace_file,
    require_folder,
    restore_backup,
    storage_errors,
)
from ._manifest import DTYPES, MANIFEST_FILE, WEIGHTS_FILE, Manifest, parse_manifest, read_manifest
from ._restore import restore_
from ._sealed import READER, FileSum, sealed, unsealed
from ._weights_file import read_weights

__all__ = [
    "DTYPES",
    "MANIFEST_FILE",
    "READER",
    "WEIGHTS_FILE",
    "FileSum",
    "Manifest",
    "describe_model",
    "import_transformers",
    "load",
    "locate_folder",
    "move_into_place",
    "parse_manifest",
    "read_file",
    "read_manifest",
    "read_plain_config",
    "read_stable",
    "read_weights",
    "replace_file",
    "require_folder",
    "restore_",
    "restore_backup",
    "save",
    "save_into",
    "sealed",
    "storage_errors",
    "unsealed",
]
