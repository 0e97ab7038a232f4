"""Manifest of a saved model, with a strict reader and writer of ``manifest.json``. No text in it is used as a path."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from etp_graph._json import shorten
from etp_graph.errors import CheckpointError
from etp_graph.plan import parse_selection
from etp_graph.surgery import Edit, SurgeryRecord

from ._files import read_file, read_stable
from ._sealed import READER, FileSum, read_hash, sealed, unsealed

FORMAT = 1

WEIGHTS_FILE = "model.safetensors"

MANIFEST_FILE = "manifest.json"

MAX_MANIFEST_BYTES = 64 * 2**20

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
        torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
    )
}  # fmt: skip
"""The element types that safetensors stores, by the name that the manifest uses."""

_KEYS = (*"format libraries fingerprints selections edits cut standins tensors aliases weights digest".split(),)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Shape and element type (a key of :data:`DTYPES`) of one stored tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def n_bytes(self) -> int:
        """Return the size of the data in bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Contents of ``manifest.json`` of a saved model.

    Attributes:
        libraries: versions of the libraries that wrote it; for information only, not checked.
        record: all rounds of surgery; empty for a model that was never pruned.
        tensors: every stored tensor by name: parameters, persistent buffers, other buffers that surgery cut.
        aliases: further names of tied tensors -> the name under which the tensor is stored.
        n_bytes: size of the weights file in bytes.
        sha256: SHA-256 of the weights file, 64 hexadecimal digits.
    """

    libraries: Mapping[str, str]
    record: SurgeryRecord
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]
    n_bytes: int
    sha256: str

    def to_json(self) -> str:
        """Return the manifest as JSON text with a digest of its contents; :func:`parse_manifest` reads it back."""
        body = {
            "format": FORMAT,
            "libraries": dict(self.libraries),
            "fingerprints": list(self.record.fingerprints),
            "selections": list(self.record.selections),
            "edits": [
                {"module": e.module, "name": e.name, "item": e.item, "value": e.value} for e in self.record.edits
            ],
            "cut": list(self.record.tensors),
            "standins": list(self.record.standins),
            **({"blocks": [list(names) for names in self.record.blocks]} if self.record.blocks else {}),
            "tensors": {name: {"shape": list(t.shape), "dtype": t.dtype} for name, t in self.tensors.items()},
            "aliases": dict(self.aliases),
            "weights": {"bytes": self.n_bytes, "sha256": self.sha256},
        }
        return json.dumps(sealed(body), indent=1)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of the model saved in the folder ``path``, without its weights.

    Raises :class:`CheckpointError` unless it is a regular file of known format, undamaged and consistent in itself.
    """
    return read_stable(path, manifest_in)


def manifest_in(folder: Path) -> Manifest:
    """Read the manifest in a folder, as :func:`read_manifest` does, while no other process writes there."""
    file = folder / MANIFEST_FILE
    return parse_manifest(read_file(file, limit=MAX_MANIFEST_BYTES), where=str(file))


def parse_manifest(data: bytes, *, where: str) -> Manifest:
    """Parse and check the bytes of a manifest; ``where`` names the file in errors (:class:`CheckpointError`)."""
    body = READER.require_object(READER.parse(data, where, fractions=False), where)
    if type(body.get("format")) is not int or body["format"] != FORMAT:
        found = shorten(body.get("format"))
        raise CheckpointError(f"{where}: format {found} is unknown, this version reads {FORMAT}. Update etp_graph.")
    READER.require_object(body, where, _KEYS, optional=("blocks",))
    body = unsealed(body, where)
    weights = FileSum.from_json(body["weights"], f"{where}: weights")
    manifest = Manifest(
        libraries={
            n: READER.require_text(v, place)
            for place, n, v in READER.list_entries(body["libraries"], f"{where}: libraries")
        },
        record=_record(body, where),
        tensors={n: _tensor(v, place) for place, n, v in READER.list_entries(body["tensors"], f"{where}: tensors")},
        aliases={
            n: READER.require_text(v, place)
            for place, n, v in READER.list_entries(body["aliases"], f"{where}: aliases")
        },
        n_bytes=weights.n_bytes,
        sha256=weights.sha256,
    )
    _check(manifest, where)
    return manifest


def _record(body: Mapping[str, Any], where: str) -> SurgeryRecord:
    """Return the record of surgery in the body of a manifest."""

    def entries(key: str) -> list[tuple[str, Any]]:
        return READER.list_items(body[key], f"{where}: {key}")

    return SurgeryRecord(
        fingerprints=tuple(read_hash(value, place) for place, value in entries("fingerprints")),
        selections=tuple(_selection(value, place) for place, value in entries("selections")),
        edits=tuple(_edit(value, place) for place, value in entries("edits")),
        tensors=READER.require_texts(body["cut"], f"{where}: cut"),
        standins=READER.require_texts(body["standins"], f"{where}: standins"),
        blocks=tuple(
            READER.require_texts(names, place)
            for place, names in READER.list_items(body.get("blocks", []), f"{where}: blocks")
        ),
    )


def _check(manifest: Manifest, where: str) -> None:
    """Raise unless the parts of a manifest are consistent with each other."""
    record = manifest.record
    if len(record.fingerprints) != len(record.selections):
        READER.refuse(where, f"{len(record.fingerprints)} fingerprints for {len(record.selections)} selections")
    READER.require_unique(((e.module, e.name, e.item) for e in record.edits), f"{where}: edits")
    for alias, name in manifest.aliases.items():
        if alias in manifest.tensors or name not in manifest.tensors:
            READER.refuse(
                f"{where}: aliases[{shorten(alias)}]",
                f"{shorten(name)} is not a stored tensor, or the alias itself is one",
            )
    for name in record.tensors:
        if name not in manifest.tensors and name not in manifest.aliases:
            READER.refuse(f"{where}: cut", f"{shorten(name)} is not a stored tensor")
    total = sum(info.n_bytes for info in manifest.tensors.values())
    if total > manifest.n_bytes:
        READER.refuse(f"{where}: tensors", f"{shorten(total)} bytes of tensors in a file of {manifest.n_bytes} bytes")


def _tensor(value: Any, where: str) -> TensorInfo:
    body = READER.require_object(value, where, ("shape", "dtype"))
    if READER.require_text(body["dtype"], f"{where}: dtype") not in DTYPES:
        READER.refuse(f"{where}: dtype", f"{shorten(body['dtype'])} is not one of {', '.join(DTYPES)}")
    shape = READER.require_list(body["shape"], f"{where}: shape")
    if len(shape) > 64:  # the maximum number of dimensions in torch
        READER.refuse(f"{where}: shape", f"{len(shape)} dimensions")
    return TensorInfo(
        shape=tuple(READER.require_integer(size, f"{where}: shape") for size in shape), dtype=body["dtype"]
    )


def _edit(value: Any, where: str) -> Edit:
    body = READER.require_object(value, where, ("module", "name", "item", "value"))
    module, name, item = (
        READER.require_text(body["module"], where),
        READER.require_text(body["name"], where),
        body["item"],
    )
    if not name.isidentifier() or name.startswith("_"):
        READER.refuse(where, f"{shorten(name)} is not the name of a public attribute")
    if item is not None:
        item = READER.require_integer(item, f"{where}: item", low=-64, high=63)
    return Edit(module=module, name=name, item=item, value=READER.require_integer(body["value"], f"{where}: value"))


def _selection(value: Any, where: str) -> str:
    """Check and return the text of a selection; build no mask."""
    parse_selection(READER, READER.require_text(value, where), where)
    return str(value)
