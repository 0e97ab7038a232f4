"""Record of the surgery on a model. It suffices to rebuild the model from the original architecture without a plan."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from etp_graph.standins import size_caches_by_keys_

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
    """

    fingerprints: tuple[str, ...] = ()
    selections: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = field(default=())
    tensors: tuple[str, ...] = ()
    standins: tuple[str, ...] = ()


def get_record(model: nn.Module) -> SurgeryRecord:
    """Return the record of a model, empty if it was never pruned. ``copy.deepcopy`` of a model copies its record."""
    record = model.__dict__.get(_KEY)
    return record if isinstance(record, SurgeryRecord) else SurgeryRecord()


def set_record(model: nn.Module, record: SurgeryRecord) -> None:
    """Store the record in the model, and let its caches follow the number of heads."""
    model.__dict__[_KEY] = record
    size_caches_by_keys_(model)


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
    """Replace the values of a parameter or buffer, perhaps with another shape. Its gradient must be ``None``.

    An autograd graph that still exists (of the last ``loss``) keeps the node that accumulates the gradient, and this
    node stores the old shape. PyTorch makes a new node when the element type of the data changes, but not when only
    the shape does. The data therefore gets another element type in between.
    """
    if isinstance(tensor, nn.Parameter) and tensor.shape != data.shape:
        other = torch.float32 if data.dtype == torch.float64 else torch.float64
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data
