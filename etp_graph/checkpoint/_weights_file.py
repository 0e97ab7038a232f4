"""Read a safetensors file in one pass: each tensor straight into its own memory, so that no second copy is needed."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from etp_graph.errors import CheckpointError

from ._files import RESTORE, open_file, storage_errors
from ._manifest import DTYPES, Manifest, TensorInfo
from ._sealed import READER, FileSum

_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16",
    "U8": "uint8", "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
"""Names of element types in a safetensors file -> in a manifest."""

_MAX_HEADER = 100_000_000
"""Bytes; safetensors reads no larger header."""


def read_weights(file: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Read the stored tensors, and check that they are exactly those of the manifest.

    The file is read once, so that the checksum holds for the values that are returned. Memory is needed for one copy.

    Raises:
        CheckpointError: the file is missing, is not the one that was written, or holds other tensors.
    """
    known = FileSum(manifest.n_bytes, manifest.sha256)
    with storage_errors(file, action="read", remedy=RESTORE, failures=(OSError,)), open_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size != known.n_bytes:
            raise CheckpointError(f"{file}: {size} bytes where {known.n_bytes} are expected. {RESTORE}")
        hashed = _Hashed(stream, known.n_bytes, file)
        try:
            places = _places(hashed, file)
        except CheckpointError:
            known.check(file)  # says that the file is damaged, if it is
            raise
        found = dict(places)
        for name in found.keys() | manifest.tensors.keys():
            if found.get(name) != manifest.tensors.get(name):
                known.check(file)
                has, says = found.get(name), manifest.tensors.get(name)
                raise CheckpointError(f"{file}: holds {name!r} as {has}, the manifest says {says}. Restore both files.")
        loaded = {name: hashed.read_tensor(info) for name, info in places}
        known.require(hashed.sum(), file)
    return {name: loaded[name] for name in manifest.tensors}


class _Hashed:
    """Stream that hashes what is read from it, up to an expected size.

    Attributes:
        left: bytes that are still expected.
    """

    def __init__(self, stream: IO[bytes], n_bytes: int, file: Path) -> None:
        self._stream, self._file = stream, file
        self._digest, self._read, self.left = hashlib.sha256(), 0, n_bytes

    def read(self, n_bytes: int) -> bytearray:
        """Return so many bytes. Raises :class:`CheckpointError` if the file is expected to be shorter."""
        if n_bytes > self.left:
            raise CheckpointError(f"{self._file}: not a safetensors file (it ends early). Restore it from a copy.")
        content = bytearray(n_bytes)
        self._fill(memoryview(content))
        return content

    def read_tensor(self, info: TensorInfo) -> Tensor:
        """Return the next tensor, in memory of its own."""
        with torch.inference_mode(False):  # else the tensors could never train
            flat = torch.empty(info.n_bytes, dtype=torch.uint8, device="cpu")
            if info.n_bytes:
                self._fill(memoryview(flat.numpy()))  # type: ignore[arg-type]  # numpy's stubs say that it is no buffer
            return flat.view(DTYPES[info.dtype]).view(info.shape)

    def sum(self) -> FileSum:
        """Return the sum of the whole file, the bytes after the last tensor included."""
        while rest := self._stream.read(2**16):
            self._digest.update(rest)
            self._read += len(rest)
        return FileSum(self._read, self._digest.hexdigest())

    def _fill(self, target: memoryview) -> None:
        done = 0
        while done < len(target) and (count := self._stream.readinto(target[done : done + 2**24])):  # type: ignore[attr-defined]
            done += count
        self._digest.update(target[:done])
        self._read += done
        self.left -= done


def _places(stream: _Hashed, file: Path) -> list[tuple[str, TensorInfo]]:
    """Return names, shapes and element types of the tensors in the order of their values. They leave no gap."""
    where = f"{file}: not a safetensors file"
    (size,) = struct.unpack("<Q", stream.read(8))
    if size > _MAX_HEADER:
        READER.refuse(where, f"its header has {size} bytes")
    body = READER.require_object(READER.parse(bytes(stream.read(size)), where), where, optional=None)
    found = [(name, *_entry(value, f"{where}: {name[:80]}")) for name, value in body.items() if name != "__metadata__"]
    found.sort(key=lambda entry: entry[2:])
    end = 0
    for name, info, begin, after in found:
        if begin != end or after != begin + info.n_bytes:
            READER.refuse(f"{where}: {name[:80]}", "its values are not behind those of the tensor before it")
        end = after
    if end != stream.left:
        READER.refuse(where, f"it has {stream.left} bytes of values, and its header {end}")
    return [(name, info) for name, info, _, _ in found]


def _entry(value: Any, where: str) -> tuple[TensorInfo, int, int]:
    body = READER.require_object(value, where, ("dtype", "shape", "data_offsets"))
    dtype = _NAMES.get(READER.require_text(body["dtype"], f"{where}: dtype"))
    if dtype is None:
        READER.refuse(where, "its element type is unknown")
    shape = tuple(READER.require_integer(size, at) for at, size in READER.list_items(body["shape"], f"{where}: shape"))
    offsets = [
        READER.require_integer(at, place)
        for place, at in READER.list_items(body["data_offsets"], f"{where}: data_offsets")
    ]
    if len(offsets) != 2:
        READER.refuse(where, "its place in the file is not given")
    return TensorInfo(shape=shape, dtype=str(dtype)), offsets[0], offsets[1]
