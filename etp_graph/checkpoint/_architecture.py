"""Build the architecture of a model of transformers from the ``config.json`` in the folder of its checkpoint."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph._config import quoted, require
from etp_graph.errors import CheckpointError
from etp_graph.model import all_tensors
from etp_graph.surgery import DENSE_CONFIG

from ._files import read_file
from ._manifest import DTYPES, Manifest

CONFIG_FILE = "config.json"

MAX_CONFIG_BYTES = 2**24


def config_text(model: nn.Module) -> str | None:
    """Return the configuration of a model of transformers as JSON text; ``None`` for any other model.

    It describes the architecture before pruning, which :func:`build_architecture` builds again.
    """
    config: Any = vars(model).get(DENSE_CONFIG) or getattr(model, "config", None)
    if not type(model).__module__.startswith("transformers.") or not hasattr(config, "to_dict"):
        return None
    body = {**config.to_dict(), "architectures": [type(model).__name__]}
    return json.dumps({**body, "pruned_with": "etp_graph: load this folder with etp_graph.load"}, indent=2, default=str)


def build_architecture(folder: Path, manifest: Manifest) -> nn.Module:
    """Return the class that ``architectures`` names, on the meta device, with the element types of the checkpoint.

    Buffers that are not stored get their values from the class. Only classes of transformers are built.

    Raises:
        CheckpointError: there is no configuration of transformers, or its class cannot be built.
    """
    file = folder / CONFIG_FILE
    if not file.exists():
        raise CheckpointError(f"{folder}: holds no {CONFIG_FILE} of transformers: give load(..., build=make_model).")
    try:
        found, body = _class_of(file)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: nn.Module = found(found.config_class.from_dict(body))
        model.eval()
        _fill_buffers(model, manifest)
    except CheckpointError:
        raise
    except Exception as error:  # the validation of configurations raises classes of its own
        why = f"{type(error).__name__}: {error}"[:300]
        raise CheckpointError(
            f"{file}: no model can be built from it ({why}): give load(..., build=make_model)."
        ) from error
    _set_dtypes(model, manifest)
    return model


def load_plain(folder: Path) -> nn.Module:
    """Load a plain folder of transformers by the class that ``architectures`` names, in eval mode.

    Raises:
        CheckpointError: the class cannot read it, or the folder lacks weights of the class.
    """
    try:
        found, _ = _class_of(folder / CONFIG_FILE)
        model, info = found.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except CheckpointError:
        raise
    except Exception as error:  # the validation of configurations raises classes of its own
        why = f"{type(error).__name__}: {error}"[:300]
        raise CheckpointError(f"{folder}: transformers cannot load it ({why}). Restore the folder.") from error
    if missing := sorted(map(str, info["missing_keys"])):
        raise CheckpointError(
            f"{folder}: lacks {quoted(missing)}, and {found.__name__} needs them. Restore the folder."
        )
    plain: nn.Module = model.eval()
    return plain


def _class_of(file: Path) -> tuple[Any, dict[str, Any]]:
    """Return the class of transformers that a configuration names, and the configuration."""
    body = json.loads(read_file(file, limit=MAX_CONFIG_BYTES))
    name = body["architectures"][0]
    found = getattr(import_transformers(), name)
    if not issubclass(found, nn.Module):
        raise TypeError(f"{name} is no model")
    return found, body


def read_plain_config(file: Path) -> dict[str, Any]:
    """Return what a ``config.json`` says of a model that its class in transformers can load and that can be pruned.

    Raises:
        CheckpointError: the file cannot be read, the model needs code of its own, or its weights are quantized or
            adapters.
    """
    try:
        body = json.loads(file.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}). Name a folder of transformers.") from error
    require(isinstance(body, dict), f"{file}: holds no configuration of transformers.", CheckpointError)
    require(
        not body.get("auto_map"),
        f"{file}: the model needs code of its own (auto_map), which is never run here. Build it in Python, and prune "
        "it with etp_graph.trace or etp_graph.oneshot_.",
        CheckpointError,
    )
    require(
        not body.get("quantization_config"),
        f"{file}: the weights are quantized. Prune the model that they were quantized from, and quantize the result.",
        CheckpointError,
    )
    adapter = file.parent / "adapter_config.json"
    require(
        not adapter.is_file(),
        f"{adapter}: these are adapters. Merge them first (model.merge_and_unload()) and save the merged model.",
        CheckpointError,
    )
    found: dict[str, Any] = body
    return found


def import_transformers() -> Any:
    """Return the library, or raise :class:`CheckpointError` if it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise CheckpointError('transformers is not installed: pip install "etp-graph[hf]".') from error


def _fill_buffers(model: Any, manifest: Manifest) -> None:
    """Let the class compute the buffers that are not stored, such as the frequencies of rotary positions."""
    stored = manifest.tensors.keys() | manifest.aliases.keys()
    for prefix, module in model.named_modules():
        missing = [name for name, _ in module.named_buffers(recurse=False) if _full(prefix, name) not in stored]
        for name in missing:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if missing:
            with torch.no_grad():
                model._init_weights(module)


def _set_dtypes(model: nn.Module, manifest: Manifest) -> None:
    """Give the tensors on the meta device the element types that the checkpoint has."""
    tensors: Mapping[str, Tensor] = all_tensors(model)
    for name, stored in {**{name: name for name in manifest.tensors}, **manifest.aliases}.items():
        if name in tensors and tensors[name].is_meta:
            tensors[name].data = tensors[name].data.to(DTYPES[manifest.tensors[stored].dtype])


def _full(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
