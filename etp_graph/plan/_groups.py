"""Groups of units, with the slices and attributes that belong to the units."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import LongTensor, Tensor

from etp_graph.errors import SelectionError

from ._reasons import without_line

MAX_UNITS = 2**26
"""Most units that a file may name. A selection takes a byte for each; models of 400 billion numbers have a tenth."""

Index = LongTensor | range
"""Positions along an axis, or the units that they belong to; a range if the values count up by one."""


def as_tensor(index: Index) -> LongTensor:
    """Return the index as an int64 tensor on the CPU, shape [k]."""
    if isinstance(index, range):
        return torch.arange(index.start, index.stop, index.step, device="cpu")  # type: ignore[return-value]
    return index


def as_index(values: Tensor | Iterable[int]) -> Index:
    """Return a range if the values count up by one, else an int64 tensor on the CPU, shape [k]."""
    tensor = torch.as_tensor(values if isinstance(values, Tensor) else list(values), dtype=torch.int64, device="cpu")
    if tensor.numel():
        start = int(tensor[0])
        if torch.equal(tensor, torch.arange(start, start + tensor.numel(), device="cpu")):
            return range(start, start + tensor.numel())
    return tensor  # type: ignore[return-value]


def index_length(indices: Iterable[Index]) -> int:
    """Return the smallest axis length that contains all positions of the indices."""
    return 1 + max(index[-1] if isinstance(index, range) else int(index.max()) for index in indices)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slice:
    """Positions of the units of one group in one tensor: position ``index[i]`` of ``axis`` belongs to ``unit[i]``.

    Surgery cuts a ``passive`` slice with its units, but the slice does not count in their norm, and no force shrinks
    it. An example is the direction of a weight-normalised layer; forces shrink its magnitude.
    """

    tensor: str
    axis: int
    index: Index
    unit: Index
    passive: bool = False

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attribute:
    """Integer attribute of a module that counts positions of units (``Conv2d.in_channels``, ``groups``).

    Surgery lowers it by the number of positions ``index[i]`` whose ``unit[i]`` is removed. ``item`` is the entry of a
    tuple attribute (``LayerNorm.normalized_shape[-1]``); ``None`` for a plain integer.
    """

    module: str
    name: str
    item: int | None
    index: Index
    unit: Index


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Units that are ranked together, with all their slices.

    Attributes:
        name: name of the module that produces the units.
        kind: what a unit is: ``channels``, ``neurons``, ``features``, ``conv-groups``, ...
        n_units: number of units.
        slices: all positions of the units in all tensors.
        attributes: module attributes that count these units.
        blocks: number of blocks, runs of consecutive units of equal length; all blocks keep the same number of units.
        multiple: the number of kept units is a multiple of this.
        min_units: at least this many units are kept.
        locked: why no unit of this group may be removed, or ``None``. It ends with the line of the model's code, such
            as ``(net.py:12)``, if there is one. The line does not count in the fingerprint.
        folded: whether a view folds the axis of these units into several axes; not in the JSON or the fingerprint.
    """

    name: str
    kind: str
    n_units: int
    slices: tuple[Slice, ...]
    attributes: tuple[Attribute, ...] = ()
    blocks: int = 1
    multiple: int = 1
    min_units: int = 1
    locked: str | None = None
    folded: bool = False

    @property
    def constraint(self) -> str:
        """Return the constraints in words, or an empty string."""
        parts = []
        if self.blocks > 1:
            parts.append(f"equal in {self.blocks} blocks")
        if self.multiple > 1:
            parts.append(f"multiple of {self.multiple}")
        if self.min_units > 1:
            parts.append(f"at least {self.min_units}")
        return ", ".join(parts)

    def check_keep(self, keep: Tensor) -> None:
        """Raise :class:`SelectionError` unless ``keep`` (bool [n_units]) satisfies every constraint."""
        where = f"Group {self.name!r} ({len(self.slices)} slices)"
        if keep.dtype != torch.bool or tuple(keep.shape) != (self.n_units,):
            raise SelectionError(
                f"{where}: expected a bool tensor of shape [{self.n_units}], got {keep.dtype} {list(keep.shape)}."
            )
        kept = int(keep.sum())
        if kept == self.n_units:
            return
        if self.locked is not None:
            raise SelectionError(f"{where} is locked ({self.locked}); keep all of its {self.n_units} units.")
        if kept < self.min_units:
            raise SelectionError(f"{where}: keeping {kept} of {self.n_units} units; keep at least {self.min_units}.")
        if kept % self.multiple:
            raise SelectionError(
                f"{where}: keeping {kept} of {self.n_units} units; keep a multiple of {self.multiple}."
            )
        per_block = keep.view(self.blocks, -1).sum(1)
        if bool((per_block != per_block[0]).any()):
            raise SelectionError(
                f"{where}: keeping {per_block.tolist()} units in its {self.blocks} blocks; "
                f"keep the same number in each, or trace with ignore={self.name!r}."
            )


def _index_json(index: Index) -> list[int] | dict[str, list[int]]:
    return {"range": [index.start, index.stop]} if isinstance(index, range) else index.tolist()


def _index_bytes(index: Index) -> bytes:
    return f"{index.start}:{index.stop}".encode() if isinstance(index, range) else index.numpy().tobytes()


def group_bytes(group: Group) -> Iterator[bytes]:
    """Yield the content of a group in pieces, for a digest. With many slices this is much faster than JSON."""
    reason = None if group.locked is None else without_line(group.locked)
    scalars = (group.name, group.kind, group.n_units, group.blocks, group.multiple, group.min_units, reason)
    yield repr(scalars).encode()
    for s in group.slices:
        yield f"|{s.tensor}|{s.axis}|{s.passive}|".encode()
        yield _index_bytes(s.index)
        yield _index_bytes(s.unit)
    for a in group.attributes:
        yield f"|{a.module}|{a.name}|{a.item}|".encode()
        yield _index_bytes(a.index)
        yield _index_bytes(a.unit)


def _index_from_json(value: Any) -> Index:
    if isinstance(value, dict):
        start, stop = value["range"]
        return range(start, stop)
    return torch.tensor(value, dtype=torch.int64, device="cpu")  # type: ignore[return-value]


def group_json(group: Group) -> dict[str, Any]:
    """Return a group as plain lists and dicts."""
    return {
        "name": group.name,
        "kind": group.kind,
        "n_units": group.n_units,
        "slices": [[s.tensor, s.axis, _index_json(s.index), _index_json(s.unit), s.passive] for s in group.slices],
        "attributes": [[a.module, a.name, a.item, _index_json(a.index), _index_json(a.unit)] for a in group.attributes],
        "blocks": group.blocks,
        "multiple": group.multiple,
        "min_units": group.min_units,
        "locked": group.locked,
    }


def group_from_json(body: dict[str, Any]) -> Group:
    """Return the group that :func:`group_json` wrote. The caller handles the errors of a malformed body."""
    return Group(
        name=body["name"],
        kind=body["kind"],
        n_units=body["n_units"],
        slices=tuple(
            Slice(tensor=t, axis=a, index=_index_from_json(i), unit=_index_from_json(u), passive=p)
            for t, a, i, u, p in body["slices"]
        ),
        attributes=tuple(
            Attribute(module=m, name=n, item=item, index=_index_from_json(i), unit=_index_from_json(u))
            for m, n, item, i, u in body["attributes"]
        ),
        blocks=body["blocks"],
        multiple=body["multiple"],
        min_units=body["min_units"],
        locked=body["locked"],
    )
