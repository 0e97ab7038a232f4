"""Numbers of layers in configurations of transformers, and where a container of blocks loses some of them.

No table of families is needed. A field that equals the number of blocks is lowered, and the class is built on the meta
device: the field counts these blocks if exactly the last of them are gone. Lists with one entry for each layer, such as
``layer_types``, lose the entries of the removed blocks at the same time.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

_BY_LAYER = re.compile(r"layer|block|type")
"""Lists whose names contain this, and that are as long as the container, have an entry for each layer."""

_COUNT = re.compile(r"^(n|num)_(\w+_)?(layers?|blocks?)$|^depth$")
"""Attributes of the module around the container that count its blocks."""

_NUMBER = re.compile(r"^(layer|block)_?(idx|id|index|number)$")
"""Attributes of modules inside of a block that hold the number of the block."""

Place = tuple[str, ...]
"""Names of nested configurations."""


def is_config(value: Any) -> bool:
    """Return True for a configuration of transformers, such as the one of the text part of a model."""
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def shorten_configs(
    model: nn.Module, container: str, removed: Sequence[int], length: int, latest: dict[int, Any]
) -> None:
    """Add to ``latest`` changed copies of the configurations that say how many blocks the container has.

    Args:
        model: a model, in which modules may hold configurations as ``config``.
        container: name of the container.
        removed: positions of the blocks that go.
        length: number of its blocks before.
        latest: the id of a configuration that a module holds -> the copy that takes its place.
    """
    path, done = container.split("."), set[int]()
    for depth in range(len(path)):
        owner = model.get_submodule(".".join(path[:depth]))
        held = vars(owner).get("config")
        if not is_config(held) or id(held) in done:
            continue
        now = latest.get(id(held), held)
        copies = _shorter(type(owner), now, ".".join(path[depth:]), removed, length)
        parts = dict(nested_configs(held))
        for place, part in nested_configs(now):
            if id(part) in copies and place in parts:
                latest[id(parts[place])] = copies[id(part)]
                done.add(id(parts[place]))


def layer_numbers(blocks: Sequence[nn.Module], removed: Sequence[int]) -> Iterator[tuple[nn.Module, str, int]]:
    """Yield the attributes of modules in the remaining blocks that hold the number of the block, with the new number.

    An attribute counts if it differs from the position of its block by the same amount in all blocks.
    """
    held: dict[tuple[str, str], dict[int, nn.Module]] = {}
    for position, block in enumerate(blocks):
        for name, module in block.named_modules():
            for key, value in vars(module).items():
                if type(value) is int and _NUMBER.search(key):
                    held.setdefault((name, key), {})[position] = module
    for (_, key), modules in held.items():
        offsets = {getattr(module, key) - position for position, module in modules.items()}
        for position, module in modules.items():
            if len(offsets) == 1 and position not in removed:
                yield module, key, getattr(module, key) - sum(gone < position for gone in removed)


def layer_counts(model: nn.Module, container: str, removed: Sequence[int], length: int) -> Iterator[Any]:
    """Yield the attributes of the module around a container that count its blocks: module, name, new value."""
    around = model.get_submodule(container.rpartition(".")[0])
    for key, value in vars(around).items():
        if type(value) is int and value == length and _COUNT.search(key):
            yield around, key, length - len(removed)


def _shorter(cls: type[nn.Module], config: Any, inner: str, removed: Sequence[int], length: int) -> dict[int, Any]:
    """Return the copies of a configuration and of those in it, if one of their fields counts the blocks."""
    dense = _module_names(cls, config)
    gone = {f"{inner}.{length - 1 - i}" for i in range(len(removed))}
    wanted = {name for name in dense if not any(name == one or name.startswith(f"{one}.") for one in gone)}
    if not gone <= dense:
        return {}
    for place, own in nested_configs(config):
        for name, item in _counting(own, length):
            for with_lists in (True, False):
                copies: dict[int, Any] = {}
                changed = copy.deepcopy(config, copies)
                part = changed
                for step in place:
                    part = getattr(part, step)
                try:
                    _lower(part, name, item, removed, with_lists=with_lists)
                except Exception:  # noqa: BLE001, S112 - the validation of configurations raises classes of its own
                    continue
                if _module_names(cls, changed) == wanted:
                    return {id(old): copies[id(old)] for _, old in nested_configs(config) if id(old) in copies}
    return {}


def _lower(config: Any, name: str, item: int | None, removed: Sequence[int], *, with_lists: bool) -> None:
    """Lower a field by the number of removed blocks, and cut the lists that have one entry for each of them."""
    values, length = dict(_own(config)), _read(getattr(config, name), item)
    if with_lists:
        for key, value in values.items():
            if key != name and isinstance(value, (list, tuple)) and len(value) == length and _BY_LAYER.search(key):
                setattr(config, key, type(value)(entry for i, entry in enumerate(value) if i not in removed))
    new: Any = length - len(removed)
    if item is not None:
        new = [new if i == item else entry for i, entry in enumerate(values[name])]
    setattr(config, name, new)


def _counting(config: Any, length: int) -> Iterator[tuple[str, int | None]]:
    """Yield the fields, and the items of fields with several numbers, that are equal to the number of blocks."""
    for name, value in _own(config):
        if type(value) is int and value == length:
            yield name, None
        elif isinstance(value, (list, tuple)) and all(type(item) is int for item in value):
            yield from ((name, i) for i, item in enumerate(value) if item == length)


def nested_configs(config: Any, at: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yield a configuration and all in it, each with its place."""
    yield at, config
    for name, value in _own(config):
        if is_config(value):
            yield from nested_configs(value, (*at, name))


def _own(config: Any) -> list[tuple[str, Any]]:
    return [(name, getattr(config, name, None)) for name in config.to_dict() if not name.startswith("_")]


def _read(value: Any, item: int | None) -> int:
    return int(value if item is None else value[item])


def _module_names(cls: type[nn.Module], config: Any) -> set[str]:
    """Return the names of the modules of a class with this configuration; none if it cannot be built."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: Any = cls
            return {name for name, _ in found(copy.deepcopy(config)).named_modules()}
    except MemoryError:  # says nothing about the configuration
        raise
    except Exception:  # noqa: BLE001 - a class of any library, with sizes that it may not accept
        return set()
