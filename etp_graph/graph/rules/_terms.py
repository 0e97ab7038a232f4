"""Cost terms of products of activations; class product -> productterm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from etp_graph.plan import ACTIVATION, Op

from ._operators import labelled_dims


@dataclass(frozen=True, slots=True)
class ProductTerm:
    """Cost term whose factors are sizes of activations.

    Attributes:
        name: name of the module.
        shape: the sizes whose product is the number of MACs.
        labels: each broadcastable to ``shape``. A position counts if none of its units is removed.
    """

    name: str
    shape: tuple[int, ...]
    labels: tuple[Tensor, ...]


def index_space(a: torch.Size, b: torch.Size) -> tuple[int, ...]:
    """Return the sizes whose product is the number of MACs of ``a @ b``: batch dimensions, m, n, k."""
    return (*torch.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1], a[-1])


def cost_terms(
    *readings: Sequence[Op | ProductTerm],
) -> tuple[tuple[Op, ...], dict[str, int], list[dict[str, list[Tensor]]]]:
    """Combine the cost terms of the readings of the same forward.

    Returns the terms, the size of every activation axis that they name, and for each reading the labels [size] of
    these axes, by name.
    """
    found: list[Op] = []
    sizes: dict[str, int] = {}
    maps: list[dict[str, list[Tensor]]] = [{} for _ in readings]
    for number, column in enumerate(zip(*readings, strict=True)):
        products = [term for term in column if isinstance(term, ProductTerm)]
        if len(products) < len(readings):
            found.append(next(term for term in column if isinstance(term, Op)))
            continue
        shape = products[0].shape
        moving = sorted({d for product in products for label in product.labels for d in labelled_dims(label)})
        name = f"{ACTIVATION}{number}"
        # If every label changes along one axis only, the cost is a product of the sizes of these axes. If a label
        # changes along several axes, they are flattened into one.
        apart = all(len(labelled_dims(label)) <= 1 for product in products for label in product.labels)
        runs = [[d] for d in moving] if apart else [moving] * bool(moving)
        names = [name if len(runs) == 1 else f"{name}.{run[0]}" for run in runs]
        for axis, run in zip(names, runs, strict=True):
            kept = [shape[d] for d in run]
            sizes[axis] = prod(kept)
            for held, product in zip(maps, products, strict=True):
                for label in product.labels:
                    if not apart or labelled_dims(label) == run:
                        small = label.permute(_moving_axes(run, label.ndim)).reshape([label.shape[d] for d in run])
                        held.setdefault(axis, []).append(small.expand(kept).reshape(-1))
        coefficient = prod(shape) // prod(shape[d] for d in moving)
        found.append(Op(name=products[0].name, coefficient=coefficient, axes=tuple((axis, 0) for axis in names)))
    return tuple(found), sizes, maps


def _moving_axes(moving: Sequence[int], ndim: int) -> list[int]:
    return [*moving, *(d for d in range(ndim) if d not in moving)]
