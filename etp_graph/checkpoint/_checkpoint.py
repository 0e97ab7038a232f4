"""Save a model, pruned or not, and load it into its original architecture.

A checkpoint is a folder with ``model.safetensors`` and ``manifest.json``. Nothing in it is ever executed, and no
text in it is ever used as a path.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from etp_graph.errors import CheckpointError
from etp_graph.model import all_tensors, first_names, persistent_names
from etp_graph.surgery import SurgeryRecord, current_record, read_attribute, was_pruned_alone

from ._architecture import CONFIG_FILE, build_architecture, config_text, load_plain
from ._files import move_into_place, read_stable, restore_backup, storage_errors, sync_folder
from ._manifest import DTYPES, MANIFEST_FILE, WEIGHTS_FILE, Manifest, TensorInfo, manifest_in, parse_manifest
from ._restore import check_supported, restore_
from ._sealed import FileSum
from ._temporary import temporary_beside
from ._weights_file import read_weights


def save(model: nn.Module, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the model to the folder ``path``, completely or not at all, and return that folder.

    Stores every parameter, every persistent buffer, and the other buffers that surgery cut. Tied tensors are stored
    once. While an existing checkpoint is overwritten, a complete one is always on disk, the old or the new one.
    :func:`load` finds it even if the process or the machine stops halfway.

    Raises:
        CheckpointError: the folder holds a checkpoint and ``overwrite`` is false, or it holds other files; it cannot
            be written; the model holds what safetensors cannot store (meta, sharded, sparse or quantized tensors,
            extra state).
    """
    folder = Path(path).absolute()
    tensors, aliases = _contents(model)
    stored = {name: _storable(tensor) for name, tensor in tensors.items()}
    with storage_errors(folder):
        restore_backup(folder)
        _check_target(folder, overwrite)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(folder) as temporary:
            temporary.mkdir()
            _write(temporary, stored, current_record(model), aliases)
            if (config := config_text(model)) is not None:
                (temporary / CONFIG_FILE).write_text(config, encoding="utf8")
            move_into_place(temporary, folder)
    return folder


def save_into(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write both files into an existing folder that may hold other files, each file completely or not at all.

    This replaces the ``model.safetensors`` in the checkpoint of another library, so that :func:`load` can read it.

    Raises:
        CheckpointError: the folder cannot be written, or the model holds what safetensors cannot store.
    """
    target = Path(folder).absolute()
    tensors, aliases = _contents(model)
    stored = {name: _storable(tensor) for name, tensor in tensors.items()}
    with storage_errors(target), temporary_beside(target / "etp_graph") as temporary:
        temporary.mkdir()
        _write(temporary, stored, current_record(model), aliases)
        sync_folder(temporary)
        for name in (WEIGHTS_FILE, MANIFEST_FILE):
            (temporary / name).replace(target / name)


def describe_model(model: nn.Module, *, sharded: bool = False) -> Manifest:
    """Return the manifest of the model in its present state, for weights that are not stored by this module.

    Its SHA-256 is all zeros, and its size is that of the tensors, not that of a file. If ``sharded`` is True,
    parameters may be sharded among processes (FSDP2); the manifest then has their full shapes.
    """
    stored, aliases = _contents(model, sharded=sharded)
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    return _manifest(current_record(model), stored, aliases, n_bytes=n_bytes, sha256="0" * 64)


def _contents(model: nn.Module, *, sharded: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors to store, by their first name, and a map from all other names of tied tensors to that one."""
    check_supported(model, sharded=sharded)
    record, tensors, persistent = current_record(model), all_tensors(model), persistent_names(model)
    names = [name for name in tensors if name in persistent or name in record.tensors]
    _check_record(model, record, names)
    first = first_names(tensors, names)
    stored = {name: tensors[name] for name in names if first[name] == name}
    for name, tensor in stored.items():
        if tensor.is_meta or str(tensor.dtype).removeprefix("torch.") not in DTYPES:
            raise CheckpointError(
                f"{name} ({tensor.dtype} on {tensor.device}) cannot be stored; convert or materialise it."
            )
    return stored, {name: first[name] for name in names if first[name] != name}


def load(
    path: str | os.PathLike[str],
    *,
    build: nn.Module | Callable[[], nn.Module] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Load the model that :func:`save` wrote to the folder ``path``.

    All values are bit-identical. An architecture of another floating type (``build().to(torch.bfloat16)``) rounds them
    to its own, as ``load_state_dict`` does.

    ``build`` is the original architecture before any pruning, or a callable without arguments that makes it. It is
    changed only after all checks. Its parameters stay the same objects, on their device, with their
    ``requires_grad`` and memory format. Tensors on the meta device are replaced by new ones on the CPU, which are tied
    as they were when saved.

    A model of transformers needs no ``build``: its class is built on the meta device from the ``config.json`` in the
    folder, and returned in eval mode. So is a plain folder of :func:`etp_graph.export.huggingface`, by its class.

    Args:
        path: the folder.
        build: the architecture, or ``None`` for a model of transformers.
        dtype: convert stored values of floating point to this type; ``None`` keeps theirs, or those of ``build``.
        device: move the model to this device; ``None`` leaves it.

    Raises:
        CheckpointError: files are missing, damaged, hostile or of an unknown format, or do not fit the architecture.
    """
    manifest, loaded, own = read_stable(path, lambda folder: _read_parts(folder, with_class=build is None))
    model = own or (build if isinstance(build, nn.Module) else build())  # type: ignore[misc]
    if manifest is not None:
        restore_(model, manifest, loaded, owned=True)
    if dtype is not None:
        _convert(model, persistent_names(model) if manifest is None else (*manifest.tensors, *manifest.aliases), dtype)
    return model if device is None else model.to(device)


def _convert(model: nn.Module, names: Iterable[str], dtype: torch.dtype) -> None:
    """Convert the named tensors of floating point. Buffers that the class computes keep their precision."""
    tensors = all_tensors(model)
    for name in names:
        if tensors[name].is_floating_point():
            tensors[name].data = tensors[name].data.to(dtype)


def _read_parts(folder: Path, *, with_class: bool) -> tuple[Manifest | None, dict[str, Tensor], nn.Module | None]:
    """Return the manifest and the weights, and the architecture of a model of transformers if ``with_class``.

    A plain folder of transformers has no manifest, and its model comes with its weights.
    """
    if with_class and (folder / CONFIG_FILE).is_file() and not os.path.lexists(folder / MANIFEST_FILE):
        return None, {}, load_plain(folder)
    manifest = manifest_in(folder)
    loaded = read_weights(folder / WEIGHTS_FILE, manifest)
    return manifest, loaded, build_architecture(folder, manifest) if with_class else None


def _check_record(model: nn.Module, record: SurgeryRecord, names: list[str]) -> None:
    """Raise if the model has changed since surgery, or if a submodule was pruned alone or has extra state."""
    for name, module in model.named_modules():
        if module is not model and was_pruned_alone(module):
            raise CheckpointError(f"{name} was pruned on its own: save that module, and load it into the whole model.")
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"{name or 'the model'} has extra state, which needs pickle; register it as a buffer."
            )
    for name in record.tensors:
        if name not in names:
            owner, _, leaf = name.rpartition(".")
            if f"{owner}.base_layer.{leaf}" in names:
                raise CheckpointError(
                    f"{name} lies in an adapter since surgery: merge it (merge_and_unload) and save then, or save the "
                    "model before the adapter is attached, and the adapter by itself."
                )
            raise CheckpointError(f"{name} was cut by surgery and is gone; put the tensor back.")
    for edit in record.edits:
        where = f"{edit.module}.{edit.name}"
        try:
            now = read_attribute(model, edit)
        except (AttributeError, TypeError, IndexError) as error:
            raise CheckpointError(
                f"{where} was lowered by surgery and is gone ({error}); put the module back."
            ) from error
        if now != edit.value:
            raise CheckpointError(f"{where} is {now}, surgery left {edit.value}: undo what changed it before saving.")


def _storable(tensor: Tensor) -> Tensor:
    """Return the values in contiguous memory of their own on the CPU; a copy is made only if needed."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    alone = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
    return plain if alone else plain.clone()  # the file format refuses tensors that share memory


def _check_target(folder: Path, overwrite: bool) -> None:
    """Raise unless the folder is free, empty, or a checkpoint that may be replaced."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file or a link, not a folder. Choose another path.")
    held = {file.name for file in folder.iterdir()}
    if others := held - {WEIGHTS_FILE, MANIFEST_FILE, CONFIG_FILE}:
        raise CheckpointError(f"{folder}: holds other files ({min(others)!r}). Choose a folder of its own.")
    if CONFIG_FILE in held and MANIFEST_FILE not in held:
        raise CheckpointError(f"{folder}: holds other files ({CONFIG_FILE!r}). Choose a folder of its own.")
    if held and not overwrite:
        raise CheckpointError(f"{folder}: holds a saved model. Choose another folder, or pass overwrite=True.")


def _write(folder: Path, stored: dict[str, Tensor], record: SurgeryRecord, aliases: dict[str, str]) -> None:
    """Write both files."""
    weights, text = folder / WEIGHTS_FILE, folder / MANIFEST_FILE
    save_file(stored, weights)
    written = FileSum.of_file(weights)
    manifest = _manifest(record, stored, aliases, n_bytes=written.n_bytes, sha256=written.sha256)
    data = manifest.to_json().encode()
    parse_manifest(data, where=str(text))  # raises here if load could not read it
    text.write_bytes(data)
    shutil.copymode(text, weights)  # safetensors ignores the umask and makes its file private


def _manifest(
    record: SurgeryRecord, stored: dict[str, Tensor], aliases: dict[str, str], *, n_bytes: int, sha256: str
) -> Manifest:
    return Manifest(
        libraries={name: _version(name) for name in ("etp_graph", "torch", "safetensors")},
        record=record,
        tensors={
            name: TensorInfo(shape=tuple(t.shape), dtype=str(t.dtype).removeprefix("torch."))
            for name, t in stored.items()
        },
        aliases=aliases,
        n_bytes=n_bytes,
        sha256=sha256,
    )


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "unknown"
