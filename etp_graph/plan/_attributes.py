"""Check that the attributes of a plan are integers of the model that count units, before surgery lowers them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from etp_graph.errors import PlanError
from etp_graph.model import CountingAttributes, as_count, counting_attributes, held_size, is_editable, named_tensors

from ._groups import Group, index_length
from ._plan_json import ACTIVATION


def check_attributes(model: nn.Module, groups: Sequence[Group]) -> None:
    """Raise :class:`PlanError` unless every attribute in the groups counts at least the positions that the plan says.

    A plan that was read from a file may name any attribute. Surgery would then write a flag, a seed or the size of a
    kernel. An attribute may count more than the positions of units, if a tensor of its module has an axis with units
    of that size: the other positions come from channels that are no units, such as those of an input image.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = dict(named_tensors(model))
    lengths: dict[tuple[str, str, int | None], int] = {}
    for a in (a for group in groups for a in group.attributes if a.module != ACTIVATION):
        key = a.module, a.name, a.item
        lengths[key] = max(lengths.get(key, 0), index_length([a.index]))
    cut = {(piece.tensor, piece.axis) for group in groups for piece in group.slices}
    for (path, name, item), length in lengths.items():
        if path not in modules:
            raise PlanError(f"the plan counts units in {name!r} of {path!r}, and there is no such module: {_REMEDY}")
        value = _count(modules[path], name, item)
        if value == length:
            continue
        inside = f"{path}." if path else ""
        sizes = {tensors[tensor].shape[axis] for tensor, axis in cut if tensor.startswith(inside)}
        layer = counting_attributes(modules[path]) != CountingAttributes()
        if value is None or value < length or not (layer or value in sizes):
            place = name if item is None else f"{name}[{item}]"
            found = "is no count of units" if value is None else f"is {value}"
            raise PlanError(f"the plan counts {length} units in {place} of {path!r}, which {found} there: {_REMEDY}")


_REMEDY = "trace this model again."


def _count(module: nn.Module, name: str, item: int | None) -> int | None:
    """Return the integer that surgery may lower, or ``None`` if there is none."""
    value = held_size(module, name)
    if not is_editable(module, name):
        return None
    if item is not None:
        if not isinstance(value, tuple | list | torch.Size) or not -len(value) <= item < len(value):
            return None
        value = value[item]
    return as_count(value)
