"""Remove whole blocks of a network, such as transformer layers, from the containers that run them one after another."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from torch import nn
from torch.optim import Optimizer

from etp_graph._config import require
from etp_graph.errors import PlanError
from etp_graph.model import all_tensors

from ._commit import Change, PreparedChanges
from ._layer_counts import is_config, layer_counts, layer_numbers, shorten_configs
from ._optimizer_states import Optimizers, list_optimizers
from ._record import get_record, swap_record

DENSE_CONFIG = "_etp_dense_config"
"""Attribute of a model that lost blocks, with its configuration before that, which :func:`etp_graph.save` writes."""


@dataclass(frozen=True, slots=True)
class _Container:
    """Container that loses blocks.

    Attributes:
        name: its name.
        module: the ``ModuleList`` or ``Sequential``.
        removed: positions of the blocks that go, sorted.
    """

    name: str
    module: nn.Module
    removed: tuple[int, ...]

    @property
    def new_keys(self) -> dict[str, str | None]:
        """New name of each entry, ``None`` for those that go. Only numbers are counted anew."""
        keys = list(self.module._modules)
        kept = [key for i, key in enumerate(keys) if i not in self.removed]
        numbered = keys == [str(i) for i in range(len(keys))]
        return {**dict.fromkeys(keys), **{key: str(i) if numbered else key for i, key in enumerate(kept)}}


def prepare_block_removal(model: nn.Module, names: Iterable[str], *, optimizer: Optimizers = None) -> PreparedChanges:
    """Prepare the removal of blocks; nothing changes before the commit.

    The blocks after a removed one move up: their names, the numbers of layers that modules and the configuration hold,
    and lists with an entry for each layer. Configurations are replaced by changed copies, because other models may
    share them. The parameters of the blocks leave the optimizers.

    Args:
        model: the model.
        names: names of entries of ``nn.ModuleList`` or ``nn.Sequential``. At least one entry of each container stays.
        optimizer: the optimizers that train the model.

    Raises:
        PlanError: a name is no entry of such a container, all blocks of one would go, or a block shares tensors with
            what stays.
    """
    containers = _containers(model, list(names))
    optimizers = list_optimizers(optimizer)
    _require_unshared(model, containers)
    return PreparedChanges(
        [
            *chain.from_iterable(_numbers(model, one) for one in containers),
            *_configs(model, containers),
            *chain.from_iterable(_forget(one, containers) for one in optimizers),
            *(_shorten(one) for one in containers),
            _extend_record(model, containers, list(names)),
        ]
    )


def _containers(model: nn.Module, names: list[str]) -> list[_Container]:
    modules = dict(model.named_modules())
    found: dict[str, list[int]] = {}
    for name in names:
        around, _, key = name.rpartition(".")
        holder = modules.get(around)
        require(
            isinstance(holder, (nn.ModuleList, nn.Sequential)) and key in holder._modules and bool(name),
            f"{name!r} is no entry of an nn.ModuleList or nn.Sequential of this model: etp_graph.depth.find_blocks "
            "lists the blocks that can be removed.",
            PlanError,
        )
        assert holder is not None
        found.setdefault(around, []).append(list(holder._modules).index(key))
    for around, positions in found.items():
        size = len(modules[around]._modules)
        require(len(set(positions)) == len(positions), f"{around!r}: a block is named twice: name it once.", PlanError)
        require(len(positions) < size, f"{around!r}: all {size} blocks would go. Keep at least one.", PlanError)
    return [_Container(around, modules[around], tuple(sorted(at))) for around, at in found.items()]


def _removed_blocks(containers: Sequence[_Container]) -> list[nn.Module]:
    return [block for one in containers for i, block in enumerate(one.module._modules.values())
            if block is not None and i in one.removed]  # fmt: skip


def _require_unshared(model: nn.Module, containers: Sequence[_Container]) -> None:
    prefixes = tuple(
        f"{one.name}.{key}." if one.name else f"{key}."
        for one in containers for key, new in one.new_keys.items() if new is None
    )  # fmt: skip
    inside, outside = dict[int, str](), dict[int, str]()
    for name, tensor in all_tensors(model).items():
        (inside if name.startswith(prefixes) else outside)[id(tensor)] = name
    for key, name in inside.items():
        require(
            key not in outside,
            f"{name} is also {outside.get(key)}, which stays: a block that shares tensors cannot be removed.",
            PlanError,
        )


def _numbers(model: nn.Module, one: _Container) -> list[Change]:
    blocks: list[Any] = list(one.module._modules.values())
    edits = [
        *layer_numbers(blocks, one.removed),
        *(layer_counts(model, one.name, one.removed, len(blocks)) if one.name else ()),
    ]
    return [_write(module, key, getattr(module, key), value) for module, key, value in edits]


def _write(module: nn.Module, name: str, old: Any, new: Any) -> Change:
    return Change(lambda: vars(module).__setitem__(name, new), lambda: vars(module).__setitem__(name, old))


def _configs(model: nn.Module, containers: Sequence[_Container]) -> list[Change]:
    """Return the changes that give modules configurations with fewer layers."""
    latest: dict[int, Any] = {}
    for one in containers:
        if one.name:
            shorten_configs(model, one.name, one.removed, len(one.module._modules), latest)
    changes = [
        _write(module, "config", held, latest[id(held)])
        for module in model.modules() if id(held := vars(module).get("config")) in latest
    ]  # fmt: skip
    if changes and DENSE_CONFIG not in vars(model) and is_config(vars(model).get("config")):
        dense = copy.deepcopy(vars(model)["config"])
        changes.append(
            Change(lambda: vars(model).__setitem__(DENSE_CONFIG, dense), lambda: vars(model).pop(DENSE_CONFIG, None))
        )
    return changes


def _forget(optimizer: Optimizer, containers: Sequence[_Container]) -> list[Change]:
    """Return the changes that take the parameters of the blocks from an optimizer, with their states."""
    gone = {id(p): p for block in _removed_blocks(containers) for p in block.parameters()}
    states: dict[Any, Any] = {p: optimizer.state[p] for p in gone.values() if p in optimizer.state}
    changes = [_put_parameters(group, [p for p in group["params"] if id(p) not in gone])
               for group in optimizer.param_groups]  # fmt: skip

    def drop() -> None:
        for p in states:
            optimizer.state.pop(p, None)

    return [*changes, Change(drop, lambda: optimizer.state.update(states))]


def _put_parameters(group: dict[str, Any], kept: list[Any]) -> Change:
    old = group["params"]
    return Change(lambda: group.__setitem__("params", kept), lambda: group.__setitem__("params", old))


def _shorten(one: _Container) -> Change:
    """Return the change of the entries of a container, which keeps its dictionary."""
    entries: Any = one.module._modules
    old, names = dict(entries), one.new_keys
    new = {names[key]: block for key, block in old.items() if names[key] is not None}

    def put(blocks: Mapping[Any, Any]) -> None:
        entries.clear()
        entries.update(blocks)

    return Change(lambda: put(new), lambda: put(old))


def _extend_record(model: nn.Module, containers: Sequence[_Container], names: Sequence[str]) -> Change:
    """Return the change of the record: a new round, and the new names of what earlier rounds changed."""
    old = get_record(model)
    changed = {id(one.module): one.new_keys for one in containers}

    def rename(path: str) -> str | None:
        module: nn.Module | None = model
        parts = []
        for part in path.split(".") if path else ():
            keys = changed.get(id(module))
            new = part if keys is None else keys.get(part, part)
            if new is None:
                return None
            parts.append(new)
            module = None if module is None else module._modules.get(part)
        return ".".join(parts)

    record = replace(
        old,
        blocks=(*old.blocks, tuple(names)),
        edits=tuple(replace(e, module=new) for e in old.edits if (new := rename(e.module)) is not None),
        tensors=tuple(new for name in old.tensors if (new := rename(name)) is not None),
        standins=tuple(new for name in old.standins if (new := rename(name)) is not None),
    )
    return Change(*swap_record(model, record))
