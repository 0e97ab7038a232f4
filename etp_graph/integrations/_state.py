"""Store the state of a pruning as one safetensors file in another library's checkpoint, with JSON in its header.

The header also holds the SHA-256 of the JSON and the tensors. Version 0.1.0 did not write it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from etp_graph._json import JsonReader, shorten
from etp_graph.checkpoint import replace_file, storage_errors
from etp_graph.errors import CheckpointError

STATE_FILE = "etp_graph.safetensors"

_KEY = "etp_graph"

_SUM = "sha256"

_MAX_BYTES = 2**30
"""Largest file that is read. A state holds a few numbers for each unit."""


def write_state(state: Mapping[str, Any], folder: Path) -> None:
    """Write the result of :meth:`Pruning.state` into an existing folder, completely or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    force = state["regularizer"]
    tensors = {name: value for name, value in (force or {}).items() if isinstance(value, Tensor)}
    plain = {key: value for key, value in force.items() if key not in tensors} if force is not None else None
    text = json.dumps({**state, "regularizer": plain})
    with storage_errors(folder):
        content = tensor_bytes(tensors, metadata={_KEY: text, _SUM: _sum(text, tensors)})
        replace_file(folder / STATE_FILE, content)


def _sum(text: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(text.encode() + tensor_bytes(dict(sorted(tensors.items())))).hexdigest()


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state that :func:`write_state` wrote.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    file = folder / STATE_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder}: holds no {STATE_FILE}. Name a checkpoint that was written while the callback was in use."
        )
    reader = JsonReader(CheckpointError, "Restore it, or use another checkpoint.")
    size = file.stat().st_size
    if size > _MAX_BYTES:
        reader.refuse(str(file), f"{size} bytes where at most {_MAX_BYTES} are expected")
    try:
        with safe_open(file, framework="pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        sound = metadata.keys() == {_KEY} or metadata == {_KEY: metadata[_KEY], _SUM: _sum(metadata[_KEY], tensors)}
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{file}: is damaged ({shorten(error)}). Restore it, or use another checkpoint."
        ) from error
    if not sound:
        reader.refuse(str(file), "is damaged: its SHA-256 is not the one that was written down")
    state = reader.require_object(reader.parse(metadata[_KEY], str(file)), str(file), ("regularizer",), optional=None)
    if state["regularizer"] is not None:
        state["regularizer"] = {**reader.require_object(state["regularizer"], f"{file}: regularizer"), **tensors}
    return state


def require_equal_shapes(model: Mapping[str, Tensor], saved: Mapping[str, Tensor], *, remedy: str) -> None:
    """Raise :class:`CheckpointError` if weights have other shapes than those of the model of the same name.

    Args:
        model: tensors of the model by name.
        saved: weights that are about to be loaded; other names are ignored.
        remedy: end of the error message.
    """
    for name, tensor in model.items():
        if name in saved and saved[name].shape != tensor.shape:
            raise CheckpointError(
                f"{name} is saved as {list(saved[name].shape)}, the model has {list(tensor.shape)}: {remedy}"
            )
