"""Digests: of JSON objects, stored within them, and of files, stored in the JSON of their folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etp_graph._json import LARGEST, JsonReader
from etp_graph.errors import CheckpointError

from ._files import RESTORE, open_file, read_file

DIGEST = "digest"

READER = JsonReader(CheckpointError, RESTORE)

_HASH = re.compile(r"[0-9a-f]{64}")


def digest_of(body: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the canonical JSON text of an object."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object with its own digest as another entry."""
    return {**body, DIGEST: digest_of(body)}


def unsealed(body: Mapping[str, Any], where: str, reader: JsonReader = READER) -> dict[str, Any]:
    """Return the object without its digest. Raise the error of ``reader`` unless the digest is that of the rest."""
    rest = {key: value for key, value in body.items() if key != DIGEST}
    try:
        sound = body.get(DIGEST) == digest_of(rest)
    except RecursionError:  # JSON text that can just be parsed may be nested too deeply to be written
        sound = False
    if not sound:
        reader.refuse(where, "does not match its own digest, it was damaged or edited")
    return rest


def read_hash(value: Any, where: str) -> str:
    """Return the value if it is a SHA-256 as 64 hexadecimal digits."""
    if not _HASH.fullmatch(READER.require_text(value, where)):
        READER.refuse(where, f"expected 64 hexadecimal digits, got {value[:70]!r}")
    return str(value)


@dataclass(frozen=True, slots=True)
class FileSum:
    """Size in bytes and SHA-256 of a file."""

    n_bytes: int
    sha256: str

    @classmethod
    def of_bytes(cls, content: bytes) -> FileSum:
        """Return the sum of a file with this content."""
        return cls(len(content), hashlib.sha256(content).hexdigest())

    @classmethod
    def of_file(cls, file: Path) -> FileSum:
        """Return the sum of a regular file, which is read in pieces. Raises :class:`CheckpointError`."""
        with open_file(file) as stream:
            digest = hashlib.file_digest(stream, "sha256")
            return cls(stream.tell(), digest.hexdigest())

    @classmethod
    def from_json(cls, value: Any, where: str) -> FileSum:
        """Return the sum that :meth:`to_json` wrote. Raises :class:`CheckpointError`."""
        body = READER.require_object(value, where, ("bytes", "sha256"))
        n_bytes = READER.require_integer(body["bytes"], f"{where}.bytes", high=LARGEST)
        return cls(n_bytes, read_hash(body["sha256"], f"{where}.sha256"))

    def to_json(self) -> dict[str, Any]:
        """Return the sum as an object that JSON can store."""
        return {"bytes": self.n_bytes, "sha256": self.sha256}

    def read(self, file: Path) -> bytes:
        """Return the content of the file. Raise :class:`CheckpointError` if it is not the one that was written."""
        content = read_file(file, limit=self.n_bytes)
        self.require(FileSum.of_bytes(content), file)
        return content

    def check(self, file: Path) -> None:
        """Raise :class:`CheckpointError` if the file is not the one that was written. It is read in pieces."""
        self.require(FileSum.of_file(file), file)

    def require(self, found: FileSum, file: Path) -> None:
        """Raise :class:`CheckpointError` if a file has another sum."""
        if found != self:
            raise CheckpointError(
                f"{file}: its SHA-256 is not the one that was written down, it was damaged or swapped. {RESTORE}"
            )
