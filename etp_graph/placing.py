"""From slices to arrays: which unit each position of an axis holds. All of a plan at once, linear in its slices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import LongTensor

from .groups import Index

Ints = npt.NDArray[np.int64]


class Placed(NamedTuple):
    """Units at positions: ``unit`` numbers, counted from ``start``, at the positions ``at``."""

    at: Index
    unit: Index
    start: int


def layered(pieces: Sequence[Placed], size: int, nobody: int) -> list[LongTensor]:
    """The flat unit number at every position, int64 [size] each; ``nobody`` where there is none.

    One layer, unless positions hold several units at once: every piece goes into the first layer that has room for it.
    """
    one = np.full(size, nobody, dtype=np.int64)
    for piece in pieces:
        one[_at(piece.at)] = _numbers(piece)
    found = [one]
    if np.count_nonzero(one != nobody) < sum(len(piece.at) for piece in pieces):
        found = []
        for piece in pieces:
            _place(found, piece, size, nobody)
    return [torch.from_numpy(layer) for layer in found]  # type: ignore[misc]


def length(indices: Iterable[Index]) -> int:
    """The number of positions up to the last one that an index names."""
    return 1 + max(index[-1] if isinstance(index, range) else int(index.max()) for index in indices)


def _place(found: list[Ints], piece: Placed, size: int, nobody: int) -> None:
    at = _at(piece.at)
    for layer in found:
        if (layer[at] == nobody).all():
            layer[at] = _numbers(piece)
            return
    layer = np.full(size, nobody, dtype=np.int64)
    layer[at] = _numbers(piece)
    found.append(layer)


def _at(index: Index) -> slice | Ints:
    return slice(index.start, index.stop, index.step) if isinstance(index, range) else index.numpy()


def _numbers(piece: Placed) -> Ints:
    if isinstance(piece.unit, range):
        first, last, step = piece.unit.start, piece.unit.stop, piece.unit.step
        return np.arange(first + piece.start, last + piece.start, step, dtype=np.int64)
    return np.asarray(piece.unit.numpy() + piece.start)
