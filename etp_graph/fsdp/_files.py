"""Checkpoints of sharded models: ``torch.distributed.checkpoint`` with a manifest, for any number of ranks.

The pruned architecture is rebuilt from the manifest; then each rank reads its own shards. PyTorch stores the index of
such a checkpoint as a pickle (``.metadata``), so load only folders that you trust.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as read_shards
from torch.distributed.checkpoint.state_dict_saver import save as write_shards
from torch.optim import Optimizer

from etp_graph.checkpoint import (
    MANIFEST_FILE,
    Manifest,
    describe_model,
    locate_folder,
    move_into_place,
    read_manifest,
    restore_backup,
    storage_errors,
)
from etp_graph.distributed import Group, raise_everywhere, require_group
from etp_graph.errors import CheckpointError, PlanError
from etp_graph.model import all_tensors, first_names

from . import _reshard as reshard
from ._sums import INDEX, check_files, gather_sums, sum_own_files, write_sums

_FAILURES = (
    OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, ImportError, EOFError, ArithmeticError,
    pickle.UnpicklingError, CheckpointException,
)  # fmt: skip
"""What PyTorch raises for files that cannot be written, or that are damaged (its index is a pickle)."""

_REMEDY = "Check space and permissions there, and whether all processes live; what was there before is still there."

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    optimizer: Optimizer | None = None,
    overwrite: bool = False,
    group: Group | None = None,
) -> Path:
    """Write a sharded model, pruned or not, to a folder that all ranks can access.

    Every rank of the group must call this. Each rank writes its own shards to a temporary folder, which is renamed once
    it is complete. A previous checkpoint stays until then.

    Args:
        model: the sharded model.
        path: the folder.
        optimizer: to be stored with the model.
        overwrite: True if a previous checkpoint may be replaced.
        group: the process group; default: all processes.

    Returns:
        The folder.

    Raises:
        PlanError: there is no process group, or a process does not answer.
        CheckpointError: the folder exists or cannot be written, or the model holds a tensor or an attribute that cannot
            be stored; raised on all ranks.
    """
    require_group()
    folder = Path(path).absolute()
    temporary = folder.with_name(f".{folder.name}.tmp")
    first = dist.get_rank(group) == 0
    described: list[Manifest] = []
    own: list[str] = []

    def add_up() -> None:
        with _errors(folder):
            own.append(sum_own_files(temporary))

    def begin() -> None:
        described.append(describe_model(model, sharded=True))
        if first:
            with _errors(folder):
                _prepare(folder, temporary, overwrite=overwrite)

    def end() -> None:
        if first:
            with _errors(folder):
                manifest = replace(described[0], sha256=write_sums(temporary, sums))
                (temporary / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf8")
                move_into_place(temporary, folder)

    raise_everywhere(begin, "Nothing was written.", group, CheckpointError)
    state: dict[str, Any] = {"model": _stored(model)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    with _errors(folder):
        write_shards(state, checkpoint_id=temporary, process_group=group)
    raise_everywhere(add_up, "", group, CheckpointError)
    sums = gather_sums(own[0], group)
    raise_everywhere(end, "", group, CheckpointError)
    return folder


def load(path: str | os.PathLike[str], *, build: reshard.Build, shard: Callable[[nn.Module], object]) -> nn.Module:
    """Return the model that :func:`save` wrote, sharded among any number of ranks. Every rank must call this.

    Args:
        path: the folder. Load only a folder that you trust, because its index is a pickle.
        build: builds the dense architecture, as before any surgery; called on the meta device.
        shard: applies ``fully_shard``.

    Raises:
        CheckpointError: files are missing or damaged, or do not fit the architecture.
        PlanError: there is no process group, or ``build`` does not build on the meta device.
    """
    require_group()
    folder = locate_folder(path)
    made: list[nn.Module] = []
    raise_everywhere(lambda: made.append(_skeleton(folder, build)), "Nothing was loaded.", None, CheckpointError)
    model = made[0]
    shard(model)
    device = reshard.device_of(model)
    reshard.fill_(model, lambda name, like: torch.empty_like(like, device=device))
    with _errors(folder, reading=True):
        read_shards({"model": _stored(model)}, checkpoint_id=folder)
    return model


def load_optimizer_(model: nn.Module, optimizer: Optimizer, path: str | os.PathLike[str]) -> None:
    """Load into a new optimizer the state that :func:`save` stored, and learning rates. Every rank must call this.

    PyTorch allocates the state by a step with a learning rate of zero, so attach a regularizer only afterwards.

    Args:
        model: the model that :func:`load` returned.
        optimizer: an optimizer of this model, of the same class as the saved one.
        path: the folder.

    Raises:
        CheckpointError: files are missing or damaged, or do not hold the state of such an optimizer.
        PlanError: there is no process group.
    """
    require_group()
    folder = locate_folder(path)
    raise_everywhere(lambda: _check(folder), "Nothing was loaded.", None, CheckpointError)
    with _errors(folder, reading=True):
        state = get_optimizer_state_dict(model, optimizer, options=_FLAT)
        read_shards({"optimizer": state}, checkpoint_id=folder)
        set_optimizer_state_dict(model, optimizer, state, options=_FLAT)


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer once.

    Buffers that are not persistent are included, because nothing computes their values on the meta device.
    """
    tensors = all_tensors(model)
    return {name: tensors[name] for name, first in first_names(tensors, tensors).items() if name == first}


def _skeleton(folder: Path, build: reshard.Build) -> nn.Module:
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder}: holds no {INDEX}, so it is not what fsdp.save writes. Use etp_graph.load.")
    try:
        return reshard.skeleton(build, _check(folder))
    except PlanError as error:
        raise CheckpointError(str(error)) from error


def _check(folder: Path) -> Manifest:
    """Return the manifest, after a check of this rank's part of the files. The index is a pickle, so it comes first."""
    with _errors(folder, reading=True):
        manifest = read_manifest(folder)
        check_files(folder, manifest)
    return manifest


def _prepare(folder: Path, temporary: Path, *, overwrite: bool) -> None:
    restore_backup(folder)
    if os.path.lexists(folder):
        held = {file.name for file in folder.iterdir()} if folder.is_dir() else {""}
        if held and not {INDEX, MANIFEST_FILE} <= held:
            raise CheckpointError(f"{folder}: holds something else than a sharded checkpoint. Choose another folder.")
        if held and not overwrite:
            raise CheckpointError(f"{folder}: holds a saved model. Choose another folder, or pass overwrite=True.")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _errors(folder: Path, *, reading: bool = False) -> AbstractContextManager[None]:
    """Turn errors of reading and writing into :class:`CheckpointError`.

    PyTorch's ``CheckpointException`` is a ``BaseException``, so ``except Exception`` would not catch it.
    """
    if reading:
        return storage_errors(folder, action="read", remedy="Restore it from a copy.", failures=_FAILURES)
    return storage_errors(folder, remedy=_REMEDY, failures=_FAILURES)
