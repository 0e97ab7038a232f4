"""Restore a saved model: turn a module of the original architecture into it, after checks of everything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from etp_graph.errors import CheckpointError, PlanError
from etp_graph.model import (
    all_tensors,
    as_count,
    first_names,
    is_editable,
    is_sharded,
    persistent_names,
    sizes_of_class,
)
from etp_graph.standins import replace_, standin
from etp_graph.surgery import (
    Edit,
    SurgeryRecord,
    get_record,
    prepare_block_removal,
    replace_data,
    swap_record,
    write_attribute,
)

from ._manifest import DTYPES, Manifest


def check_supported(model: object, *, sharded: bool = False) -> None:
    """Raise :class:`CheckpointError` unless this is an uncompiled module with ordinary dense tensors.

    If ``sharded`` is True, parameters that are sharded among processes (FSDP2) are also accepted.
    """
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"build: expected an nn.Module, got {type(model).__name__}; return the architecture.")
    if type(model).__name__ == "OptimizedModule" or isinstance(model, torch.jit.ScriptModule):
        raise CheckpointError(f"{type(model).__name__} is compiled; use the original module and compile it afterwards.")
    for name, tensor in all_tensors(model).items():
        if is_sharded(tensor):
            if sharded:
                continue
            raise CheckpointError(f"{name} is shared among processes (FSDP2): use etp_graph.fsdp.save and load.")
        if is_lazy(tensor) or type(tensor.data) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
            kind = f"{type(tensor).__name__}, {tensor.layout}"
            raise CheckpointError(
                f"{name} is no ordinary dense tensor ({kind}); gather or materialise the model first."
            )
        if tensor.is_inference():
            raise CheckpointError(f"{name} was made in inference mode; build the model outside torch.inference_mode().")


def restore_(model: nn.Module, manifest: Manifest, loaded: Mapping[str, Tensor], *, owned: bool = False) -> None:
    """Turn the original architecture into the saved model, or raise :class:`CheckpointError` and change nothing.

    Values on the meta device only set the shapes of an architecture on the meta device. Buffers that are not stored
    keep their values.

    Args:
        model: the architecture.
        manifest: describes the saved model.
        loaded: its tensors by name.
        owned: nobody else holds the tensors, so that they may become those of the model; else they are copied.
    """
    check_supported(model)
    if get_record(model) != SurgeryRecord():
        raise CheckpointError("build: this module was pruned before; give the original, unpruned architecture.")
    with ExitStack() as undo:
        for names in manifest.record.blocks:
            _remove_blocks(model, names, undo)
        _restore_units(model, manifest, loaded, owned=owned)
        undo.pop_all()


def _remove_blocks(model: nn.Module, names: Iterable[str], undo: ExitStack) -> None:
    """Remove the blocks of one round of surgery from the architecture, until everything is undone."""
    try:
        surgery = prepare_block_removal(model, names)
    except PlanError as error:
        raise CheckpointError(f"{error} Build the architecture that was saved.") from error
    undo.callback(surgery.undo)
    surgery.commit()


def _restore_units(model: nn.Module, manifest: Manifest, loaded: Mapping[str, Tensor], *, owned: bool) -> None:
    """Give an architecture that has the blocks of the saved model its widths and values, or change nothing."""
    tensors = all_tensors(model)
    stored_as = {name: name for name in manifest.tensors} | dict(manifest.aliases)
    skeleton = any(value.is_meta for value in loaded.values())
    _check_names(model, manifest, tensors, stored_as, skeleton=skeleton)
    _check_ties(tensors, stored_as)
    _check_shapes(manifest, tensors, stored_as)
    _check_edits(model, manifest.record.edits)
    _check_standins(model, manifest.record.standins)
    with torch.inference_mode(False), torch.no_grad():
        staged = {name: _staged_value(tensors[name], value, owned=owned) for name, value in loaded.items()}
        _put_tensors(model, manifest.record, tensors, {name: staged[first] for name, first in stored_as.items()})


def _check_names(
    model: nn.Module,
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    stored_as: Mapping[str, str],
    *,
    skeleton: bool,
) -> None:
    """Raise unless the checkpoint holds all parameters and persistent buffers, and else only buffers surgery cut."""
    needed = persistent_names(model)
    for name in stored_as:
        if name not in tensors or (name not in needed and name not in manifest.record.tensors):
            raise CheckpointError(
                f"{name!r} is saved, but no state of this architecture: build the one that was saved."
            )
    for name in tensors:
        if name in needed and name not in stored_as:
            raise CheckpointError(
                f"{name} of this architecture is not in the checkpoint: build the one that was saved."
            )
        if tensors[name].is_meta and name not in stored_as and not skeleton:
            raise CheckpointError(
                f"{name} is on the meta device and not stored: build the model on a real device, or call load without "
                "build if the folder has a config.json."
            )


def _check_ties(tensors: Mapping[str, Tensor], stored_as: Mapping[str, str]) -> None:
    """Raise if tensors that were tied when saved are separate in the architecture, or the other way round.

    Tensors on the meta device have no values yet. Those that were tied become one tensor.
    """
    first = first_names(tensors, stored_as)
    objects: dict[int, str] = {}
    for name, stored in stored_as.items():
        if first[name] != first[stored] and not (tensors[name].is_meta and tensors[stored].is_meta):
            raise CheckpointError(f"{name} and {stored} were tied when saved: tie them in the architecture.")
        if objects.setdefault(id(tensors[name]), stored) != stored:
            raise CheckpointError(f"{name} is tied here, and was not when saved: build it with separate tensors.")


def _check_shapes(manifest: Manifest, tensors: Mapping[str, Tensor], stored_as: Mapping[str, str]) -> None:
    """Raise unless the shapes are equal, and the element types are equal or floating.

    Only a tensor that surgery cut may have smaller dimensions. Floating values become those of the architecture, as in
    ``load_state_dict``.
    """
    cut = {stored_as[name] for name in manifest.record.tensors}
    for name, stored in stored_as.items():
        info, tensor = manifest.tensors[stored], tensors[name]
        saved_dtype = DTYPES[info.dtype]
        if tensor.dtype != saved_dtype and not (tensor.is_floating_point() and saved_dtype.is_floating_point):
            remedy = f"load into an architecture of {info.dtype} (build().to(torch.{info.dtype})) and convert it then"
            raise CheckpointError(f"{name} is saved as {info.dtype}, the architecture has {tensor.dtype}: {remedy}.")
        have, saved = tuple(tensor.shape), info.shape
        fits = len(have) == len(saved) and all(s <= h for s, h in zip(saved, have, strict=True))
        if not fits or (stored not in cut and have != saved):
            remedy = "build the architecture that was traced, unpruned"
            raise CheckpointError(f"{name} is saved as {list(saved)}, the architecture has {list(have)}: {remedy}.")


def _check_standins(model: nn.Module, names: Iterable[str]) -> None:
    """Raise unless a stand-in is known for every module whose class surgery replaced."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        found = standin(modules[name]) if name in modules else None
        if found is None or found[1]:
            raise CheckpointError(
                f"{name!r} was saved with a stand-in, and has none here: import the code that registers it "
                "(etp_graph.register_standin), and build the architecture that was saved."
            )


def _check_edits(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Raise unless every edit lowers, or keeps, an integer that surgery may write, on a module that exists."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for edit in edits:
        where = f"attribute {edit.name!r} of {edit.module!r}"
        if edit.module not in modules:
            raise CheckpointError(f"{where}: the architecture has no such module: build the one that was saved.")
        module = modules[edit.module]
        held = {**sizes_of_class(module.__class__), **module.__dict__}
        if edit.name not in held or not is_editable(module, edit.name):
            raise CheckpointError(f"{where}: surgery writes no such attribute there. Save the model again.")
        value = held[edit.name]
        if edit.item is not None:
            if type(value) not in (tuple, list, torch.Size) or not -len(value) <= edit.item < len(value):
                raise CheckpointError(f"{where} has no entry {edit.item}: build the architecture that was saved.")
            value = value[edit.item]
        if (count := as_count(value)) is None or not 0 <= edit.value <= count:
            raise CheckpointError(f"{where} is {value!r}, and cannot become {edit.value}: build the unpruned original.")


def _staged_value(old: Tensor, value: Tensor, *, owned: bool) -> Tensor:
    """Return the value on the device and in the memory format of the old tensor; maybe the value itself if owned."""
    device = value.device if value.is_meta else torch.device("cpu") if old.is_meta else old.device
    fits = value.device == device and value.dtype == old.dtype and _order(old) == _order(value)
    if owned and fits and value.is_contiguous():
        return value
    if old.shape == value.shape:
        new = torch.empty_like(old, device=device, requires_grad=False)
    else:
        new = torch.empty_permuted(value.shape, _order(old), dtype=old.dtype, device=device)
    return new.copy_(value)


def _order(tensor: Tensor) -> list[int]:
    """Return the axes in the order of the memory, the slowest first."""
    return sorted(range(tensor.ndim), key=lambda axis: -tensor.stride()[axis])


def _put_tensors(
    model: nn.Module, record: SurgeryRecord, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> None:
    """Write classes, attributes and tensors. After an error all changes are undone.

    What undoes a change is written down before the change, because an interrupt may come in between.
    """
    fresh: dict[int, Tensor] = {}
    with ExitStack() as undo:
        for name in record.standins:
            module = model.get_submodule(name)
            undo.callback(_restore_class, module, type(module), set(module.__dict__))
        replace_(model, record.standins)
        for edit in record.edits:
            undo.callback(setattr, module := model.get_submodule(edit.module), edit.name, getattr(module, edit.name))
            write_attribute(model, edit)
        for name, value in values.items():
            old = tensors[name]
            if old.is_meta:
                path, _, leaf = name.rpartition(".")
                undo.callback(setattr, owner := model.get_submodule(path), leaf, old)
                setattr(owner, leaf, fresh.setdefault(id(value), _materialised(old, value)))
                continue
            if isinstance(old, nn.Parameter):
                undo.callback(setattr, old, "grad", old.grad)
                old.grad = None  # the gradient belongs to the old values
            undo.callback(setattr, old, "data", old.data)
            replace_data(old, value)
        if record != SurgeryRecord():
            store, put_back = swap_record(model, record)  # there is one of the blocks that are gone already
            undo.callback(put_back)
            store()
        undo.pop_all()


def _restore_class(module: nn.Module, cls: type[nn.Module], names: set[str]) -> None:
    """Undo a stand-in: set the class, and remove the attributes that the stand-in keeps in the module."""
    module.__class__ = cls
    for name in module.__dict__.keys() - names:
        del module.__dict__[name]


def _materialised(old: Tensor, value: Tensor) -> Tensor:
    """Return the value as a parameter or buffer like the old one on the meta device, with its Python attributes."""
    if not isinstance(old, nn.Parameter):
        return value
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    return new
