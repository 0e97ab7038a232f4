"""Find out what a pruning function of Torch-Pruning cuts, by running it on copies of a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph.errors import PlanError
from etp_graph.model import named_tensors
from etp_graph.plan import NO_UNIT

Prune = Callable[..., Any]
"""``prune_out_channels(layer, indices)`` or ``prune_in_channels`` of a ``torch_pruning.BasePruningFunc``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedCut:
    """Where the units of a layer live.

    Attributes:
        axes: (tensor, axis) -> the unit of each position, int64 [size]; ``NO_UNIT`` for positions that are never cut.
        attributes: (path of the submodule, name, item of a tuple or ``None``) of the integers that count the units.
    """

    axes: dict[tuple[str, int], Tensor]
    attributes: tuple[tuple[str, str, int | None], ...]


def probe_pruner(layer: nn.Module, prune: Prune, pruning_dim: int, n_units: int, where: str) -> ProbedCut:
    """Find the position of every unit in every tensor of a layer, in 2 log2(n_units) runs of its pruning function.

    For each bit b, one run removes the units whose number has bit b set, and another run removes the other units. A
    position that is cut exactly once for each b belongs to one unit. The runs that cut it give the bits of its number.

    Args:
        layer: the layer; only copies of it are changed.
        prune: its pruning function.
        pruning_dim: value for the attribute ``pruning_dim`` of the pruner.
        n_units: number of units of the layer.
        where: name of the layer, for messages.

    Raises:
        PlanError: the function replaces a tensor, cuts a position with several units, or changes an attribute by a
            number other than that of the removed units.
    """
    bits = (n_units - 1).bit_length()
    found: dict[tuple[str, int], Tensor] = {}
    steps: dict[tuple[str, str, int | None], int] = {}
    for bit in range(bits):
        for value in (0, 1):
            removed = [i for i in range(n_units) if (i >> bit & 1) == value]
            cut = _pruned_copy(layer, prune, pruning_dim, removed, where)
            for axis, gone in _missing_positions(layer, cut, where).items():
                row = torch.tensor([value << bit, 1], device="cpu") * gone[:, None]
                found[axis] = found.get(axis, torch.zeros_like(row)) + row
            for key, less in _lowered_attributes(layer, cut).items():
                steps[key] = steps.get(key, 0) + (less == len(removed))
    odd = [name for (_, name, _), times in steps.items() if times != 2 * bits]
    if odd:
        raise PlanError(f"the pruner of {where!r} changes {', '.join(odd)} by other than the number of units.")
    for (name, _), (_, times) in ((axis, rows.unbind(1)) for axis, rows in found.items()):
        mixed = ((times != 0) & (times != bits)).nonzero().flatten()
        if len(mixed):
            raise PlanError(f"the pruner of {where!r} cuts {mixed[:8].tolist()} of {name} with several units.")
    axes = {axis: torch.where(rows[:, 1] > 0, rows[:, 0], NO_UNIT) for axis, rows in found.items()}
    return ProbedCut(axes=axes, attributes=tuple(steps))


def _stored_tensors(layer: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in named_tensors(layer) if tensor.ndim]


def _pruned_copy(layer: nn.Module, prune: Prune, pruning_dim: int, removed: list[int], where: str) -> nn.Module:
    """Run the pruner on a copy of the layer in whose tensors every number is its own position."""
    module = copy.deepcopy(layer)
    for _, tensor in _stored_tensors(module):
        tensor.requires_grad_(False)
        tensor.data = torch.arange(tensor.numel(), dtype=torch.float64, device="cpu").view(tensor.shape)
    prune.__self__.pruning_dim = pruning_dim  # type: ignore[attr-defined]
    try:
        prune(module, removed)
    except Exception as error:  # a pruner is code of another library or of the user
        raise PlanError(f"the pruner of {where!r} cannot run: {type(error).__name__} {error}".rstrip() + ".") from error
    return module


def _missing_positions(layer: nn.Module, cut: nn.Module, where: str) -> dict[tuple[str, int], Tensor]:
    """Return for every (tensor, axis) that became shorter 1 for each position that was cut, else 0, int64 [size]."""
    after = dict(_stored_tensors(cut))
    found: dict[tuple[str, int], Tensor] = {}
    for name, tensor in _stored_tensors(layer):
        if name not in after or after[name].ndim != tensor.ndim:
            raise PlanError(f"the pruner of {where!r} replaces {name} by something else.")
        left = torch.unravel_index(after[name].detach().flatten().long(), tensor.shape)
        for axis, size in enumerate(tensor.shape):
            if after[name].shape[axis] < size:
                found[name, axis] = torch.ones(size, dtype=torch.int64, device="cpu")
                found[name, axis][left[axis]] = 0
    return found


def _lowered_attributes(layer: nn.Module, cut: nn.Module) -> dict[tuple[str, str, int | None], int]:
    """Return the decrease of each integer attribute, or entry of a tuple, that changed.

    Keys are (path of the submodule, name, item of a tuple or ``None``).
    """
    after = dict(cut.named_modules())
    found: dict[tuple[str, str, int | None], int] = {}
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            now = vars(after[path]).get(name)
            if type(value) is int and type(now) is int:
                found[path, name, None] = value - now
            elif isinstance(value, tuple) and isinstance(now, tuple) and len(value) == len(now):
                pairs = enumerate(zip(value, now))
                found |= {(path, name, i): a - b for i, (a, b) in pairs if type(a) is int and type(b) is int}
    return {key: less for key, less in found.items() if less}
