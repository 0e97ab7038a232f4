"""Integer fields of a configuration of transformers, read and written by their path."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[str | int, ...]
"""Names of nested configurations, the name of the field, and the place in it if it is a list."""

_NO_WIDTH = re.compile(r"_ids?$|vocab|layers|num_labels|version|position|max_|seed|num_beams|size_divisor|chunk_size")
"""Fields that count no units: tokens, layers, positions."""

_OPTIONAL = re.compile(r"head|dim|inner|size")
"""Fields that may set a width although they are ``None``: the class then computes a default."""

_ASSUMED = ("head_dim",)
"""Fields that many classes read if a configuration has them, and that not every configuration declares."""


def width_fields(config: Any, at: Path = ()) -> Iterator[Path]:
    """Yield the path of every integer above 1 that may be a width, of nested configurations too."""
    for name, value in _own(config):
        if is_config(value):
            yield from width_fields(value, (*at, name))
        elif _NO_WIDTH.search(name):
            continue
        elif _is_width(value):
            yield (*at, name)
        elif isinstance(value, (list, tuple)) and all(type(item) is int for item in value):
            yield from ((*at, name, i) for i, item in enumerate(value) if _is_width(item))


def unset_fields(config: Any, at: Path = ()) -> Iterator[Path]:
    """Yield the path of every field that may set a width and is not set."""
    own = dict(_own(config))
    for name, value in own.items():
        if is_config(value):
            yield from unset_fields(value, (*at, name))
        elif value is None and _OPTIONAL.search(name) and not _NO_WIDTH.search(name):
            yield (*at, name)
    yield from ((*at, name) for name in _ASSUMED if name not in own)


def with_values(config: Any, values: Mapping[Path, int]) -> Any:
    """Return a copy of a configuration with other values."""
    changed = copy.deepcopy(config)
    for path, value in values.items():
        owner, name, item = _owner(changed, path)
        if item is None:
            setattr(owner, name, value)
        else:
            items = list(getattr(owner, name))
            items[item] = value
            setattr(owner, name, items)
    return changed


def read_value(config: Any, path: Path) -> int:
    """Return the value at a path."""
    owner, name, item = _owner(config, path)
    value = getattr(owner, name)
    return int(value if item is None else value[item])


def path_text(path: Path) -> str:
    """Return a path as text, such as ``text_config.hidden_size``."""
    return ".".join(str(part) for part in path)


def is_config(value: Any) -> bool:
    """Return True for a configuration of transformers, such as the one of the text part of a model."""
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def _is_width(value: Any) -> bool:
    return type(value) is int and value > 1


def _own(config: Any) -> list[tuple[str, Any]]:
    names = [name for name in config.to_dict() if not name.startswith("_")]
    return [(name, getattr(config, name, None)) for name in names]


def _owner(config: Any, path: Path) -> tuple[Any, str, int | None]:
    *owners, last = path
    item = last if isinstance(last, int) else None
    name = owners.pop() if item is not None else last
    for part in owners:
        config = getattr(config, str(part))
    return config, str(name), item
