"""SHA-256 of the files of a sharded checkpoint. Each rank computes those of its own files, and checks a part of all.

``sums.json`` holds them. The manifest holds its SHA-256 in the place of that of the weights; version 0.1.0 wrote zeros.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist

from etp_graph.checkpoint import MANIFEST_FILE, READER, FileSum, Manifest, read_file, sealed, unsealed
from etp_graph.distributed import Group, gather_strings
from etp_graph.errors import CheckpointError

INDEX = ".metadata"

SUMS_FILE = "sums.json"

_FORMAT = 1

_NO_SUMS = "0" * 64

_MAX_BYTES = 64 * 2**20


def sum_own_files(folder: Path) -> str:
    """Return the sums of the files that this rank wrote, as JSON text.

    Raises:
        CheckpointError: a file cannot be read.
    """
    return _text(folder, [name for name in _names(folder) if name.startswith(f"__{dist.get_rank()}_")])


def write_sums(folder: Path, texts: list[str]) -> str:
    """Write the sums that all ranks returned, and those of files that no rank named. Return the SHA-256 to store.

    Raises:
        CheckpointError: a file cannot be read.
        OSError: the file cannot be written.
    """
    found = {name: value for text in texts for name, value in json.loads(text).items()}
    found |= json.loads(_text(folder, [name for name in _names(folder) if name not in found]))
    content = json.dumps(sealed({"format": _FORMAT, "files": found})).encode()
    (folder / SUMS_FILE).write_bytes(content)
    return FileSum.of_bytes(content).sha256


def gather_sums(text: str, group: Group | None) -> list[str]:
    """Return what :func:`sum_own_files` returned on each rank."""
    return [text for (text,) in gather_strings((text,), group)]


def check_files(folder: Path, manifest: Manifest, group: Group | None = None) -> None:
    """Check this rank's part of the files of a folder. Other ranks check the rest, so call it on all of them.

    Raises:
        CheckpointError: a file is missing, damaged or a link, or nobody wrote down what it held.
    """
    if manifest.sha256 == _NO_SUMS:
        return  # written by version 0.1.0
    sums = _read_sums(folder, manifest.sha256)
    held = _names(folder) - {MANIFEST_FILE, SUMS_FILE}
    if missing := sorted(sums.keys() - held):  # names of the text are not used as paths unless they are in the folder
        READER.refuse(str(folder), f"{missing[0][:80]!r} is missing")
    if odd := sorted(name for name in held - sums.keys() if name == INDEX or name.endswith(".distcp")):
        READER.refuse(str(folder / odd[0]), f"is not among the files in {SUMS_FILE}")
    for name in sorted(sums)[dist.get_rank(group) :: dist.get_world_size(group)]:
        sums[name].check(folder / name)


def _read_sums(folder: Path, sha256: str) -> dict[str, FileSum]:
    file = folder / SUMS_FILE
    content = read_file(file, limit=_MAX_BYTES)
    if FileSum.of_bytes(content).sha256 != sha256:
        raise CheckpointError(f"{file}: its SHA-256 is not the manifest's, it was damaged. Restore the folder.")
    where = str(file)
    body = READER.require_object(READER.parse(content, where, fractions=False), where, ("format", "files", "digest"))
    files = READER.list_entries(unsealed(body, where)["files"], f"{where}: files")
    return {name: FileSum.from_json(value, place) for place, name, value in files}


def _names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def _text(folder: Path, names: list[str]) -> str:
    return json.dumps({name: FileSum.of_file(folder / name).to_json() for name in sorted(names)})
