"""What the registry says of a model, and the inputs that many models share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[], Any]
"""Makes example inputs, the same in every call: a tensor, a tuple of positional or a dict of keyword arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A model of the registry.

    Attributes:
        name: name in the registry.
        family: the family whose table it stands in.
        build: makes the model in eval mode, with the initial weights of its authors.
        inputs: makes the inputs that it was designed for.
        small: makes the smallest inputs that it runs on, where the others are too large for gradients in float64.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    small: Inputs


def entry(name: str, family: str, build: Callable[[], nn.Module], inputs: Inputs, small: Inputs | None = None) -> Entry:
    """An entry whose model is put into eval mode; without ``small`` the inputs are small enough."""
    return Entry(name=name, family=family, build=lambda: build().eval(), inputs=inputs, small=small or inputs)


def by_name(entries: Iterable[Entry]) -> dict[str, Entry]:
    """The entries by name; a name that comes twice is an error of the registry."""
    found: dict[str, Entry] = {}
    for each in entries:
        if each.name in found:
            raise ValueError(f"the registry has two models named {each.name!r}")
        found[each.name] = each
    return found


def images(size: int, *, batch: int = 1, channels: int = 3) -> Inputs:
    """Normal noise, [batch, channels, size, size]."""
    return lambda: noise(batch, channels, size, size)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers of this shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, vocabulary: int = 101, seed: int = 0) -> Tensor:
    """Token numbers of this shape; the first few of the vocabulary, which may be padding and the like, do not come."""
    return torch.randint(5, vocabulary, shape, generator=torch.Generator().manual_seed(seed))
