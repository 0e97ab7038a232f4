"""Record of the surgery on a model. It suffices to rebuild the model from the original architecture without a plan."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph.standins import size_caches_by_config_, size_caches_by_keys_

_KEY = "_etp_record"
"""Attribute of a module that surgery was called with."""

_PART = "_etp_part"
"""Attribute of a module inside such a module."""

_IN_ADAPTER = re.compile(r"\.(base_layer|modules_to_save\.[^.]+)(?=\.|$)")
"""The place of a layer in an adapter around it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """Value of a module attribute after surgery. ``item`` is the index into a tuple, ``None`` for an integer."""

    module: str
    name: str
    item: int | None
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SurgeryRecord:
    """Record of all rounds of surgery on one model.

    Attributes:
        fingerprints: fingerprint of the plan of each round.
        selections: :meth:`Selection.to_json` of each round.
        edits: the attributes that surgery changed, with their present values.
        tensors: names of the tensors that surgery cut.
        standins: names of the modules whose class surgery replaced by its stand-in.
        blocks: names of the blocks that each removal of blocks took out, as they were called before it. All other names
            are those after the last removal.
    """

    fingerprints: tuple[str, ...] = ()
    selections: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = field(default=())
    tensors: tuple[str, ...] = ()
    standins: tuple[str, ...] = ()
    blocks: tuple[tuple[str, ...], ...] = ()


def get_record(model: nn.Module) -> SurgeryRecord:
    """Return the record of a model, empty if it was never pruned. ``copy.deepcopy`` of a model copies its record.

    A module inside a pruned model has the part of the record that concerns it, under its own names, so that it can be
    saved and pruned again without the model around it. A new container of such modules has what they have.
    """
    for key in (_KEY, _PART):
        record = model.__dict__.get(key)
        if isinstance(record, SurgeryRecord):
            return record
    if not any(_KEY in vars(module) or _PART in vars(module) for module in model.modules()):
        return SurgeryRecord()
    inside = [(name, get_record(child)) for name, child in model.named_children() if not was_pruned_alone(child)]
    found = [_below(name, record) for name, record in inside if record != SurgeryRecord()]
    rounds = dict.fromkeys(pair for one in found for pair in zip(one.fingerprints, one.selections, strict=True))
    return SurgeryRecord(
        fingerprints=tuple(fingerprint for fingerprint, _ in rounds),
        selections=tuple(selection for _, selection in rounds),
        edits=tuple(edit for one in found for edit in one.edits),
        tensors=tuple(name for one in found for name in one.tensors),
        standins=tuple(name for one in found for name in one.standins),
        blocks=tuple(names for one in found for names in one.blocks),
    )


def _below(name: str, record: SurgeryRecord) -> SurgeryRecord:
    """Return the record of a module under the names of the module that holds it as ``name``."""

    def outer(inner: str) -> str:
        return f"{name}.{inner}" if inner else name

    return replace(
        record,
        edits=tuple(replace(edit, module=outer(edit.module)) for edit in record.edits),
        tensors=tuple(map(outer, record.tensors)),
        standins=tuple(map(outer, record.standins)),
        blocks=tuple(tuple(map(outer, names)) for names in record.blocks),
    )


def current_record(model: nn.Module) -> SurgeryRecord:
    """Return the record of a model under the names that its tensors have now.

    An adapter (peft) that was attached during surgery puts the layer one level deeper, in ``base_layer``. Merging it
    takes the layer out again, and the tensors of the adapter are gone.
    """
    record, modules = get_record(model), dict(model.named_modules(remove_duplicate=False))
    unwrapped: dict[str, None] = {}

    def current(name: str) -> str:
        for match in _IN_ADAPTER.finditer(name):
            outer = name[: match.start()]
            if outer in modules and name[: match.end()] not in modules:
                unwrapped.setdefault(outer)
                return current(outer + name[match.end() :])
        return name

    tensors, standins = [current(name) for name in record.tensors], [current(name) for name in record.standins]
    edits = {((module := current(e.module)), e.name, e.item): replace(e, module=module) for e in record.edits}
    if not unwrapped:
        return record
    names = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}

    def gone(name: str, known: Container[str]) -> bool:
        return name not in known and any(name.startswith(f"{outer}.") for outer in unwrapped)

    return replace(
        record,
        tensors=tuple(dict.fromkeys(name for name in tensors if not gone(name, names))),
        standins=tuple(dict.fromkeys(name for name in standins if not gone(name, modules))),
        edits=tuple(
            e for e in edits.values() if not gone(e.module, modules)
            and (e.module not in unwrapped or hasattr(modules[e.module], e.name))
        ),
    )  # fmt: skip


def was_pruned_alone(module: nn.Module) -> bool:
    """Return True if surgery was called with this module, and not only with a model around it."""
    return _KEY in module.__dict__


def set_record(model: nn.Module, record: SurgeryRecord) -> None:
    """Store the record in the model, and its parts in the modules that they concern.

    From then on the caches of models of transformers among them follow their number of heads, and their
    ``save_pretrained`` warns.
    """
    _drop_parts(model)
    _put_record(model, _KEY, record)
    for path, part in _parts(record).items():
        with suppress(AttributeError):  # a record read from a file names modules that are not there yet
            _put_record(model.get_submodule(path), _PART, part)
    size_caches_by_keys_(model)


def _put_record(module: nn.Module, key: str, record: SurgeryRecord) -> None:
    module.__dict__[key] = record
    narrower = bool(record.tensors or record.edits)  # a configuration describes a model that only lost blocks
    if narrower and callable(getattr(type(module), "save_pretrained", None)):
        # on the instance and not on the class, which others use; copies of the model get it too
        module.__dict__["save_pretrained"] = MethodType(save_pretrained, module)
    elif key == _KEY:
        module.__dict__.pop("save_pretrained", None)


def _parts(record: SurgeryRecord) -> dict[str, SurgeryRecord]:
    """Return path of a module -> the part of the record that concerns it, under its own names."""
    edits: defaultdict[str, list[Edit]] = defaultdict(list)
    tensors: defaultdict[str, list[str]] = defaultdict(list)
    standins: defaultdict[str, list[str]] = defaultdict(list)
    blocks: defaultdict[str, list[tuple[str, ...]]] = defaultdict(list)
    for name in record.tensors:
        for path, rest in _splits(name):
            tensors[path].append(rest)
    for name in record.standins:
        for path, rest in (*_splits(name), (name, "")):
            standins[path].append(rest)
    for edit in record.edits:
        for path, rest in (*_splits(edit.module), (edit.module, "")):
            edits[path].append(Edit(module=rest, name=edit.name, item=edit.item, value=edit.value))
    for names in record.blocks:
        held: defaultdict[str, list[str]] = defaultdict(list)
        for name in names:
            for path, rest in _splits(name):
                held[path].append(rest)
        for path, inside in held.items():
            blocks[path].append(tuple(inside))
    return {
        path: SurgeryRecord(
            fingerprints=record.fingerprints,
            selections=record.selections,
            edits=tuple(edits[path]),
            tensors=tuple(tensors[path]),
            standins=tuple(standins[path]),
            blocks=tuple(blocks[path]),
        )
        for path in {*edits, *tensors, *standins, *blocks}
        if path
    }


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Yield the ways to divide a name into the path of a module and a name inside it."""
    at = name.find(".")
    while at >= 0:
        yield name[:at], name[at + 1 :]
        at = name.find(".", at + 1)


def save_pretrained(model: Any, *args: Any, **options: Any) -> Any:
    """Call the method of the class, after a warning that its configuration has the sizes before surgery.

    It has the name of that method, because pickle stores it by this name.
    """
    warnings.warn(
        f"{type(model).__name__} was pruned, and save_pretrained writes a config with the sizes before that, which "
        "from_pretrained cannot load: use etp_graph.export.huggingface(model, folder), or etp_graph.save.",
        stacklevel=2,
    )
    return type(model).save_pretrained(model, *args, **options)


def remove_record(model: nn.Module) -> None:
    """Remove the record from the model and what came with it, as before its first surgery."""
    size_caches_by_config_(model)
    model.__dict__.pop(_KEY, None)
    model.__dict__.pop("save_pretrained", None)
    _drop_parts(model)


def swap_record(model: nn.Module, record: SurgeryRecord) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return two functions: one stores the record of a model, and one stores those that were there before."""
    own = model.__dict__.get(_KEY)
    parts = [(module, module.__dict__[_PART]) for module in model.modules() if _PART in module.__dict__]

    def put_back() -> None:
        if own is None:
            remove_record(model)
        else:
            set_record(model, own)
        _drop_parts(model)
        for module, part in parts:
            _put_record(module, _PART, part)
        if parts:
            size_caches_by_keys_(model)

    return lambda: set_record(model, record), put_back


def _drop_parts(model: nn.Module) -> None:
    for module in model.modules():
        if module.__dict__.pop(_PART, None) is not None and _KEY not in module.__dict__:
            module.__dict__.pop("save_pretrained", None)


def read_attribute(model: nn.Module, edit: Edit) -> int:
    """Return the present value of the attribute that an edit names."""
    value = getattr(model.get_submodule(edit.module), edit.name)
    return int(value if edit.item is None else value[edit.item])


def write_attribute(model: nn.Module, edit: Edit) -> None:
    """Set the attribute that an edit names, keeping the type of a tuple attribute."""
    module = model.get_submodule(edit.module)
    if edit.item is None:
        setattr(module, edit.name, edit.value)
        return
    old = getattr(module, edit.name)
    items = list(old)
    items[edit.item] = edit.value
    setattr(module, edit.name, type(old)(items))


def replace_data(tensor: Tensor, data: Tensor) -> None:
    """Replace the values of a parameter or buffer, perhaps with another shape. Its gradient must be ``None``."""
    apply, _ = swap_data(tensor, tensor.data, data)
    apply()


def swap_data(tensor: Tensor, old: Tensor, new: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return two functions that give a tensor the data ``new``, and ``old`` again. They allocate nothing.

    An autograd graph that still exists (of the last ``loss``) keeps the node that accumulates the gradient, and this
    node stores the old shape. PyTorch makes a new node when the element type of the data changes, but not when only
    the shape does. The data therefore gets another element type in between.
    """
    between: list[Tensor] = []
    if isinstance(tensor, nn.Parameter) and old.shape != new.shape:
        other = torch.float32 if new.dtype == torch.float64 else torch.float64
        between.append(torch.empty(0, dtype=other, device=tensor.device))

    def put(data: Tensor) -> None:
        for empty in between:
            tensor.data = empty
        tensor.data = data

    return lambda: put(new), lambda: put(old)
