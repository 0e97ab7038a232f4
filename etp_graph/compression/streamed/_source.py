"""Read a folder of transformers tensor by tensor, without loading the model."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from etp_graph._config import quoted, require
from etp_graph.checkpoint import import_transformers, read_plain_config
from etp_graph.errors import CheckpointError
from etp_graph.model import all_tensors, first_names, persistent_names

INDEX_FILE = "model.safetensors.index.json"

_NOT_COPIED = frozenset((INDEX_FILE, "config.json", "pytorch_model.bin.index.json"))

_COPIED = frozenset(".json .txt .model .jinja".split())
"""Endings of the files of tokenizers, processors and generation settings."""

_UNREADABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError)
"""What transformers raises for a configuration that it cannot read."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor is stored: the file and its name in it; and its shape and element type."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class SourceFolder:
    """Folder of transformers with its configuration and the places of its tensors.

    Attributes:
        path: the folder.
        config: its configuration.
        model_class: the class that ``architectures`` names.
        stored: the tensors by their names in the files.

    Raises:
        CheckpointError: it holds no model of transformers in safetensors files, or one that needs code of its own, is
            quantized or an adapter.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        transformers = import_transformers()
        body = read_plain_config(path / "config.json")
        try:
            self.config: Any = transformers.AutoConfig.from_pretrained(str(path))
            self.model_class: Any = getattr(transformers, str((body.get("architectures") or [""])[0]))
        except _UNREADABLE as error:
            raise CheckpointError(
                f"{path}: transformers {transformers.__version__} does not know the model ({error}). Name its class in "
                "architectures (config.json)."
            ) from error
        self.stored = {tensor.key: tensor for file in _weight_files(path) for tensor in _read_header(file)}
        require(bool(self.stored), f"{path}: holds no tensors in safetensors files.", CheckpointError)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of most numbers."""
        counts: dict[torch.dtype, int] = {}
        for tensor in self.stored.values():
            if tensor.dtype.is_floating_point:
                counts[tensor.dtype] = counts.get(tensor.dtype, 0) + torch.Size(tensor.shape).numel()
        return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(torch.Size(t.shape).numel() * t.dtype.itemsize for t in self.stored.values())

    def identity(self) -> dict[str, Any]:
        """Return what changes when somebody changes the model: names, sizes and times of its files."""
        files = sorted({tensor.file for tensor in self.stored.values()} | {self.path / "config.json"})
        return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}

    def other_files(self) -> list[Path]:
        """Return the files of the tokenizer, the processor and the generation settings."""
        return [
            file for file in sorted(self.path.iterdir())
            if file.is_file() and file.suffix in _COPIED and file.name not in _NOT_COPIED
        ]  # fmt: skip

    def keys_of(self, model: nn.Module) -> dict[str, str]:
        """Return the name in the files of each tensor of the class. Tensors that are tied share one.

        Raises:
            CheckpointError: the files lack tensors of the class, or hold others than it has.
        """
        tensors, wanted = all_tensors(model), persistent_names(model)
        first = first_names(tensors, sorted(wanted))
        found = {name: key for key in self.stored if (name := self._name_of(key, model, wanted)) in wanted}
        groups = {first[name]: key for name, key in found.items()}
        keys = {name: found.get(name, groups.get(first[name], "")) for name in sorted(wanted)}
        self._require_complete([name for name, key in keys.items() if not key], found.values(), model)
        for name, key in keys.items():
            require(
                tuple(tensors[name].shape) == self.stored[key].shape,
                f"{self.path}: {key} has shape {list(self.stored[key].shape)}, and the class needs "
                f"{list(tensors[name].shape)}: restore the folder.",
                CheckpointError,
            )
        return keys

    def _name_of(self, key: str, model: nn.Module, wanted: Collection[str]) -> str:
        """Return the name in the class of a tensor in the files, which may lack or have that of the base model."""
        name, prefix = _renamed(key, model), f"{getattr(model, 'base_model_prefix', '')}."
        return next((way for way in (name, prefix + name, name.removeprefix(prefix)) if way in wanted), name)

    def _require_complete(self, missing: list[str], used: Iterable[str], model: nn.Module) -> None:
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        more = [k for k in self.stored.keys() - set(used) if not any(re.search(p, k) for p in (*ignored, "inv_freq$"))]
        for words, keys in (("lacks", missing), ("also holds", more)):
            require(
                not keys,
                f"{self.path}: {words} {quoted(sorted(keys))}, by the class {type(model).__name__}. Name the class "
                "that wrote it in architectures (config.json), or load it with that class and call save_pretrained.",
                CheckpointError,
            )

    def read(self, key: str) -> Tensor:
        """Return a tensor. Its pages are read from the file when they are used."""
        tensor = self.stored[key]
        try:
            with safe_open(tensor.file, framework="pt") as file:
                found: Tensor = file.get_tensor(key)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{tensor.file}: {key} cannot be read ({error}). Restore the folder.") from error
        return found


def _weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of the model."""
    index = path / INDEX_FILE
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: cannot be read ({error}). Restore it.") from error
        require(
            all(isinstance(name, str) and Path(name).name == name for name in names),
            f"{index}: names files outside of its folder. Restore it.",
            CheckpointError,
        )
        return [path / name for name in names]
    found = sorted(path.glob("*.safetensors"))
    require(
        len(found) == 1,
        f"{path}: holds {len(found) or 'no'} safetensors files and no {INDEX_FILE}. Load the model and call "
        "save_pretrained.",
        CheckpointError,
    )
    return found


def _read_header(file: Path) -> list[StoredTensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  # no mapping
            return [
                StoredTensor(file, key, tuple(one.get_shape()), _dtype(file, key, one.get_dtype()))
                for key, one in slices.items()
            ]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}). Restore the folder.") from error


def _dtype(file: Path, key: str, name: str) -> torch.dtype:
    found = _DTYPES.get(name)
    if found is None:
        raise CheckpointError(f"{file}: {key} is quantized ({name}). Prune the model in float32, float16 or bfloat16.")
    return found


_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "I64": torch.int64,
}  # fmt: skip


def _renamed(key: str, model: nn.Module) -> str:
    """Return a name in files by the rules with which this release of transformers renames them as it loads."""
    try:
        loading = import_module("transformers.core_model_loading")
        rules = import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
        found: str = loading.apply_renamings(key, [rule for rule in rules if isinstance(rule, loading.WeightRenaming)])
    except (ImportError, AttributeError):  # a release without such rules
        return key
    return found
