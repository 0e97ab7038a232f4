"""What surgery did to a model: enough to rebuild it from the original architecture, without a plan."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

_KEY = "_etp_record"


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """A module attribute after surgery. ``item`` is the entry of a tuple attribute, ``None`` for an integer."""

    module: str
    name: str
    item: int | None
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SurgeryRecord:
    """All rounds of surgery on one model.

    Attributes:
        fingerprints: fingerprint of the plan of each round.
        selections: :meth:`Selection.to_json` of each round.
        edits: the attributes that surgery changed, with their present values.
        tensors: names of the tensors that surgery cut.
        standins: names of the modules that surgery gave the class that stands in for theirs.
    """

    fingerprints: tuple[str, ...] = ()
    selections: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = field(default=())
    tensors: tuple[str, ...] = ()
    standins: tuple[str, ...] = ()


def get_record(model: nn.Module) -> SurgeryRecord:
    """The record of a model; empty for one that was never pruned. It survives ``copy.deepcopy``."""
    record = model.__dict__.get(_KEY)
    return record if isinstance(record, SurgeryRecord) else SurgeryRecord()


def set_record(model: nn.Module, record: SurgeryRecord) -> None:
    """Remember what was done to the model."""
    model.__dict__[_KEY] = record


def read_attribute(model: nn.Module, edit: Edit) -> int:
    """The present value of the attribute that an edit names."""
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
    """Give a parameter or buffer, which has no gradient now, other values and perhaps another shape.

    A graph that is still alive (the ``loss`` of the last step) holds the node that accumulates the gradient,
    and that node remembers the shape. PyTorch makes a new one when the type of the data changes, not its shape.
    """
    if isinstance(tensor, nn.Parameter) and tensor.shape != data.shape:
        other = torch.float32 if data.dtype == torch.float64 else torch.float64
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data
