"""Record of the surgery on a model. It suffices to rebuild the model from the original architecture without a plan."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph.standins import size_caches_by_config_, size_caches_by_keys_

_KEY = "_etp_record"


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
    """Return the record of a model, empty if it was never pruned. ``copy.deepcopy`` of a model copies its record."""
    record = model.__dict__.get(_KEY)
    return record if isinstance(record, SurgeryRecord) else SurgeryRecord()


def set_record(model: nn.Module, record: SurgeryRecord) -> None:
    """Store the record in the model.

    From then on the caches of a model of transformers follow its number of heads, and its ``save_pretrained`` warns.
    """
    model.__dict__[_KEY] = record
    size_caches_by_keys_(model)
    narrower = bool(record.tensors or record.edits)  # a configuration describes a model that only lost blocks
    if narrower and callable(getattr(type(model), "save_pretrained", None)):
        # on the instance and not on the class, which others use; copies of the model get it too
        model.__dict__["save_pretrained"] = MethodType(save_pretrained, model)
    else:
        model.__dict__.pop("save_pretrained", None)


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
