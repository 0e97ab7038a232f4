"""Load a folder of transformers: the class that it names, its weights, its tokenizer. Nothing is downloaded."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from etp_graph._config import quoted, require
from etp_graph.checkpoint import MANIFEST_FILE, load, read_plain_config
from etp_graph.errors import CheckpointError, EtpError

_WEIGHTS = ("*.safetensors", "*.bin")

_TOKENIZERS = ("tokenizer*", "vocab*", "spiece.model", "preprocessor_config.json", "processor_config.json")

_UNREADABLE = (
    OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError, IndexError, EOFError,
    SafetensorError, UnpicklingError, struct.error,
)  # fmt: skip
"""What transformers raises for folders that it cannot read, and for files in them that are cut off or damaged."""


class FolderError(EtpError):
    """A folder of transformers holds no model that can be loaded as it is."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FolderModel:
    """Model of a folder.

    Attributes:
        model: the model, in float32 and eval mode.
        tokenizer: its tokenizer or processor, or ``None`` if the folder has none.
        dtype: element type of the stored weights; ``None`` if there are none and the weights are random.
    """

    model: Any
    tokenizer: Any
    dtype: torch.dtype | None


def load_folder(transformers: Any, text: str) -> FolderModel:
    """Load the class that ``architectures`` names, with the weights and the tokenizer beside it.

    A path to a ``config.json``, or a folder without weights, gives random weights. A folder with one GGUF file gives
    the language model in it, dequantized. A folder of :func:`etp_graph.save` gives the pruned model.

    Raises:
        FolderError: there is no model, or it needs code of its own, is quantized, is an adapter, or lacks tensors.
    """
    path = Path(text).expanduser()
    folder = path if path.is_dir() else path.parent
    packed = sorted(folder.glob("*.gguf")) if path.is_dir() else [path] if path.suffix == ".gguf" else []
    if len(packed) == 1 and not (folder / "config.json").is_file():
        return _load(transformers, transformers.AutoModelForCausalLM, folder, {"gguf_file": packed[0].name}, text)
    if len(packed) > 1 and not (folder / "config.json").is_file():
        raise FolderError(f"hf:{text}: holds {len(packed)} GGUF files. Name one of them, like hf:{packed[0]}.")
    file = folder / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FolderError(
            f"hf:{text}: no file {file}. Name a local config.json or its folder; nothing is downloaded from the Hub."
        )
    body = _checked_config(file)
    if path.is_dir() and (folder / MANIFEST_FILE).is_file():
        model: Any = load(folder)
        tokenizer, dtype = _tokenizer(transformers, folder, {}), model.dtype
        return FolderModel(model=model.float(), tokenizer=tokenizer, dtype=dtype)
    found = _class(transformers, file, body)
    if not path.is_dir() or not any(True for form in _WEIGHTS for _ in folder.glob(form)):
        return FolderModel(model=_random_model(transformers, found, file), tokenizer=None, dtype=None)
    return _load(transformers, found, folder, {}, text)


def _checked_config(file: Path) -> Any:
    """Return what a ``config.json`` says, or raise :class:`FolderError` for what cannot be pruned as it is."""
    try:
        return read_plain_config(file)
    except CheckpointError as error:
        raise FolderError(str(error)) from error


def _class(transformers: Any, file: Path, body: dict[str, Any]) -> Any:
    """Return the class that ``architectures`` names, or ``AutoModel`` if the configuration names none."""
    names = body.get("architectures") or []
    require(
        isinstance(names, list),
        f"{file}: architectures is {names!r}; it has to be a list with the name of a class, like [{names!r}].",
        FolderError,
    )
    if not names:
        return transformers.AutoModel
    found = getattr(transformers, str(names[0]), None)
    require(
        found is not None,
        f"{file}: architectures names {names[0]!r}, which transformers {transformers.__version__} does not have.",
        FolderError,
    )
    known = getattr(getattr(found, "config_class", None), "model_type", None)
    require(
        known in (None, body.get("model_type")),
        f"{file}: architectures names {names[0]}, a class of {known!r}, and model_type is {body.get('model_type')!r}: "
        "they have to fit.",
        FolderError,
    )
    return found


def _random_model(transformers: Any, found: Any, file: Path) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(str(file))
        build = found.from_config if found is transformers.AutoModel else found
        return build(config)
    except _UNREADABLE as error:
        raise FolderError(f"{file}: transformers cannot build a model from it: {error}") from error


def _load(transformers: Any, found: Any, folder: Path, more: dict[str, str], text: str) -> FolderModel:
    try:
        model, info = found.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **more
        )
    except _UNREADABLE as error:
        raise FolderError(
            f"hf:{text}: transformers cannot load it: {error or type(error).__name__}. Restore the files from a copy."
        ) from error
    for name, stored, built in sorted(info["mismatched_keys"], key=str)[:1]:
        raise FolderError(
            f"hf:{text}: cannot load it: {name} is stored with the sizes {list(stored)}, and {type(model).__name__} "
            f"has {list(built)} by config.json ({len(info['mismatched_keys'])} such tensors). Restore the config.json "
            "that belongs to the weights."
        )
    for words, keys in (("lacks", info["missing_keys"]), ("also holds", info["unexpected_keys"])):
        require(
            not keys,
            f"hf:{text}: the folder {words} {quoted(sorted(map(str, keys)))}, by the class {type(model).__name__}. "
            "Name the class that wrote it in architectures (config.json), or restore the files.",
            FolderError,
        )
    stated = getattr(model.config, "dtype", None)
    return FolderModel(
        model=model.eval(),
        tokenizer=_tokenizer(transformers, folder, more),
        dtype=_stored_dtype(folder) or (stated if isinstance(stated, torch.dtype) else torch.float32),
    )


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """Return the element type that ``config.json`` names, because the loaded model was converted to float32."""
    file = folder / "config.json"
    body = json.loads(file.read_text(encoding="utf8")) if file.is_file() else {}
    found = getattr(torch, str(body.get("dtype") or body.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) else None


def _tokenizer(transformers: Any, folder: Path, more: dict[str, str]) -> Any:
    """Return the tokenizer or processor of a folder, or ``None`` if it has none."""
    if more:
        return transformers.AutoTokenizer.from_pretrained(folder, **more)
    if not any(True for form in _TOKENIZERS for _ in folder.glob(form)):
        return None
    try:
        return transformers.AutoProcessor.from_pretrained(folder)
    except _UNREADABLE as error:
        raise FolderError(f"{folder}: its tokenizer cannot be read ({error}).") from error
