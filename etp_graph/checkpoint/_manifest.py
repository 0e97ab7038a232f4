"""Manifest of a saved model, with a strict reader and writer of ``manifest.json``. No text in it is used as a path."""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

import torch

from etp_graph.errors import CheckpointError
from etp_graph.surgery import Edit, SurgeryRecord

from ._files import RESTORE, locate_folder, read_file

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

_LARGEST = 2**62

_HASH = re.compile(r"[0-9a-f]{64}")


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
            "tensors": {name: {"shape": list(t.shape), "dtype": t.dtype} for name, t in self.tensors.items()},
            "aliases": dict(self.aliases),
            "weights": {"bytes": self.n_bytes, "sha256": self.sha256},
        }
        return json.dumps({**body, "digest": _digest(body)}, indent=1)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of the model saved in the folder ``path``, without its weights.

    Raises :class:`CheckpointError` unless it is a regular file of known format, undamaged and consistent in itself.
    """
    file = locate_folder(path) / MANIFEST_FILE
    return parse_manifest(read_file(file, limit=MAX_MANIFEST_BYTES), where=str(file))


def parse_manifest(data: bytes, *, where: str) -> Manifest:
    """Parse and check the bytes of a manifest; ``where`` names the file in errors (:class:`CheckpointError`)."""
    body = _object(_parse_json(data, where), where)
    if type(body.get("format")) is not int or body["format"] != FORMAT:
        found = reprlib.repr(body.get("format"))
        raise CheckpointError(f"{where}: format {found} is unknown, this version reads {FORMAT}. Update etp_graph.")
    _object(body, where, _KEYS)
    digest = body.pop("digest")
    try:
        sealed = digest == _digest(body)
    except RecursionError:  # JSON text that can just be parsed may be nested too deeply to be written
        sealed = False
    if not sealed:
        raise CheckpointError(f"{where}: does not match its own digest, it was damaged or edited. {RESTORE}")
    weights = _object(body["weights"], f"{where}: weights", ("bytes", "sha256"))
    libraries = _object(body["libraries"], f"{where}: libraries")
    manifest = Manifest(
        libraries={name: _text(version, f"{where}: libraries[{name!r}]") for name, version in libraries.items()},
        record=SurgeryRecord(
            fingerprints=tuple(_hash(value, w) for w, value in _items(body, "fingerprints", where)),
            selections=tuple(_selection(value, w) for w, value in _items(body, "selections", where)),
            edits=tuple(_edit(value, w) for w, value in _items(body, "edits", where)),
            tensors=tuple(_text(value, w) for w, value in _items(body, "cut", where)),
            standins=tuple(_text(value, w) for w, value in _items(body, "standins", where)),
        ),
        tensors={n: _tensor(v, f"{where}: {n!r}") for n, v in _object(body["tensors"], f"{where}: tensors").items()},
        aliases=_aliases(body, where),
        n_bytes=_integer(weights["bytes"], f"{where}: weights.bytes"),
        sha256=_hash(weights["sha256"], f"{where}: weights.sha256"),
    )
    _check(manifest, where)
    return manifest


def _check(manifest: Manifest, where: str) -> None:
    """Raise unless the parts of a manifest are consistent with each other."""
    record = manifest.record
    if len(record.fingerprints) != len(record.selections):
        _refuse(where, f"{len(record.fingerprints)} fingerprints for {len(record.selections)} selections")
    _unique(((e.module, e.name, e.item) for e in record.edits), f"{where}: edits")
    _unique(record.tensors, f"{where}: cut")
    _unique(record.standins, f"{where}: standins")
    for alias, name in manifest.aliases.items():
        if alias in manifest.tensors or name not in manifest.tensors:
            _refuse(f"{where}: aliases[{alias!r}]", f"{name!r} is not a stored tensor, or the alias itself is one")
    for name in record.tensors:
        if name not in manifest.tensors and name not in manifest.aliases:
            _refuse(f"{where}: cut", f"{name!r} is not a stored tensor")
    total = sum(info.n_bytes for info in manifest.tensors.values())
    if total > manifest.n_bytes:
        _refuse(f"{where}: tensors", f"{total} bytes of tensors in a file of {manifest.n_bytes} bytes")


def _digest(body: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the canonical JSON text of a manifest without its digest."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _parse_json(data: bytes | str, where: str) -> Any:
    """Parse JSON that consists of objects, lists, strings and integers. Fractions, NaN and repeated keys raise."""
    try:
        text = data.decode() if isinstance(data, bytes) else data
        return json.loads(text, object_pairs_hook=_pairs, parse_float=_no_number, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not a valid manifest text ({error}). {RESTORE}") from error


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:20]} is not an integer")


def _refuse(where: str, what: str) -> NoReturn:
    raise CheckpointError(f"{where}: {what}. {RESTORE}")


def _unique(values: Iterable[Any], where: str) -> None:
    seen = set()
    for value in values:
        if value in seen:
            _refuse(where, f"{value!r} occurs twice")
        seen.add(value)


def _object(value: Any, where: str, keys: tuple[str, ...] | None = None) -> dict[str, Any]:
    if type(value) is not dict:
        _refuse(where, f"expected an object, got {reprlib.repr(value)}")
    if keys is not None and value.keys() != set(keys):
        _refuse(where, f"expected the keys {', '.join(keys)}, got {reprlib.repr(sorted(value))}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if type(value) is not list:
        _refuse(where, f"expected a list, got {reprlib.repr(value)}")
    return value


def _items(body: Mapping[str, Any], key: str, where: str) -> list[tuple[str, Any]]:
    """Return the entries of a list, each with its place for error messages."""
    return [(f"{where}: {key}[{i}]", value) for i, value in enumerate(_list(body[key], f"{where}: {key}"))]


def _text(value: Any, where: str) -> str:
    if type(value) is not str:
        _refuse(where, f"expected a text, got {reprlib.repr(value)}")
    return value


def _hash(value: Any, where: str) -> str:
    if not _HASH.fullmatch(_text(value, where)):
        _refuse(where, f"expected 64 hexadecimal digits, got {reprlib.repr(value)}")
    return str(value)


def _integer(value: Any, where: str, *, low: int = 0, high: int = _LARGEST) -> int:
    if type(value) is not int or not low <= value <= high:  # isinstance would accept a bool
        _refuse(where, f"expected an integer from {low} to {high}, got {reprlib.repr(value)}")
    return value


def _tensor(value: Any, where: str) -> TensorInfo:
    body = _object(value, where, ("shape", "dtype"))
    if _text(body["dtype"], f"{where}: dtype") not in DTYPES:
        _refuse(f"{where}: dtype", f"{reprlib.repr(body['dtype'])} is not one of {', '.join(DTYPES)}")
    shape = _list(body["shape"], f"{where}: shape")
    if len(shape) > 64:  # the maximum number of dimensions in torch
        _refuse(f"{where}: shape", f"{len(shape)} dimensions")
    return TensorInfo(shape=tuple(_integer(size, f"{where}: shape") for size in shape), dtype=body["dtype"])


def _aliases(body: Mapping[str, Any], where: str) -> dict[str, str]:
    found = _object(body["aliases"], f"{where}: aliases")
    return {alias: _text(name, f"{where}: aliases[{alias!r}]") for alias, name in found.items()}


def _edit(value: Any, where: str) -> Edit:
    body = _object(value, where, ("module", "name", "item", "value"))
    module, name, item = _text(body["module"], where), _text(body["name"], where), body["item"]
    if not name.isidentifier() or name.startswith("_"):
        _refuse(where, f"{reprlib.repr(name)} is not the name of a public attribute")
    if item is not None:
        item = _integer(item, f"{where}: item", low=-64, high=63)
    return Edit(module=module, name=name, item=item, value=_integer(body["value"], f"{where}: value"))


def _selection(value: Any, where: str) -> str:
    """Check and return the text of a selection, group name -> [number of units, removed units]; build no mask."""
    for name, entry in _object(_parse_json(_text(value, where), where), where).items():
        if type(entry) is not list or len(entry) != 2:
            _refuse(f"{where}: {name!r}", f"expected [units, removed units], got {reprlib.repr(entry)}")
        n_units = _integer(entry[0], f"{where}: {name!r}", high=2**31)
        removed = [
            _integer(unit, f"{where}: {name!r}", high=n_units - 1) for unit in _list(entry[1], f"{where}: {name!r}")
        ]
        _unique(removed, f"{where}: {name!r}")
    return str(value)
