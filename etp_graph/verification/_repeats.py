"""Copies of large models in which repeated blocks share their tensors, for a check that fits into memory.

A large model is a stack of equal blocks. If the plan says the same of each block, one of them stands for all. In the
copy the first block of each kind has its own tensors, whose units the check removes. All other blocks of the kind use
the tensors of the second one. Units that lie in several blocks, as those of the residual stream, are removed in all of
them. What the check finds in the first block holds for the others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph.model import all_tensors, named_tensors
from etp_graph.plan import Group, Index, Plan, as_tensor

_MINIMUM = 3
"""Number of equal blocks from which sharing saves memory."""


@dataclass(frozen=True, slots=True)
class RepeatedBlocks:
    """Equal blocks of a model.

    Attributes:
        families: names of the blocks of each kind. The first has its own tensors, the others share those of the second.
        inner: block -> names of the groups whose units lie in this block only, in the order of the plan.
    """

    families: tuple[tuple[str, ...], ...]
    inner: Mapping[str, tuple[str, ...]]

    def sharing(self) -> Iterator[tuple[str, str]]:
        """Yield each block without own tensors, with the block whose tensors it uses."""
        for family in self.families:
            yield from ((name, family[1]) for name in family[2:])

    def reduce_plan(self, plan: Plan, names: Iterable[str], device: str) -> Plan:
        """Return the plan for a copy that has the named tensors only, without the groups inside of shared blocks."""
        held = set(names)
        shared = {name for family in self.families for block in family[1:] for name in self.inner[block]}
        groups = []
        for group in plan.groups:
            slices = tuple(piece for piece in group.slices if piece.tensor in held)
            if group.name not in shared and slices:
                groups.append(replace(group, slices=slices))
        tensors = {name: shape for name, shape in plan.tensors.items() if name in held}
        parameters = tuple(name for name in plan.parameters if name in held)
        return replace(plan, groups=tuple(groups), tensors=tensors, parameters=parameters, ops=(), device=device)

    def repeat_locks(self, locks: Mapping[str, str]) -> dict[str, str]:
        """Return the locks of groups, repeated for the same groups of all blocks of the kind."""
        found = dict(locks)
        for first, *others in self.families:
            for at, name in enumerate(self.inner[first]):
                if name in locks:
                    found |= {
                        self.inner[block][at]: f"{locks[name]} (in the equal block {first!r})" for block in others
                    }
        return found


def find_repeated_blocks(model: nn.Module, plan: Plan) -> RepeatedBlocks:
    """Find the blocks of a model that have equal tensors and of which the plan says the same."""
    blocks = {name for siblings in _siblings(model) for name in siblings}
    inner: dict[str, list[str]] = {name: [] for name in blocks}
    said: dict[str, list[Any]] = {name: [] for name in blocks}
    for group in plan.groups:
        owners = {_outer_block(piece.tensor, blocks) for piece in group.slices}
        alone = owners.pop() if len(owners) == 1 else None
        if alone is not None:
            inner[alone].append(group.name)
        for block, entry in _statements(group, blocks, "" if alone is not None else group.name):
            said[block].append(entry)
    sizes = _shapes_by_block(model, blocks)
    families: list[tuple[str, ...]] = []
    for siblings in _siblings(model):
        outer = [name for name in siblings if _outer_block(f"{name}.", blocks) == name]
        found = _equal([name for name in outer if sizes[name]], lambda name: (sizes[name], said[name]))
        families += [tuple(family) for family in found]
    return RepeatedBlocks(tuple(families), {name: tuple(groups) for name, groups in inner.items()})


def _siblings(model: nn.Module) -> Iterator[list[str]]:
    """Yield the names of the children of each module that have the same class, if they are several."""
    for name, module in model.named_modules():
        by_class: dict[type[nn.Module], list[str]] = {}
        for child, part in module.named_children():
            by_class.setdefault(type(part), []).append(f"{name}.{child}" if name else child)
        yield from (found for found in by_class.values() if len(found) >= _MINIMUM)


def _equal(names: Sequence[str], describe: Any) -> list[list[str]]:
    """Group the names with equal descriptions; return the groups that are large enough."""
    found: list[tuple[Any, list[str]]] = []
    for name in names:
        mine = describe(name)
        for other, members in found:
            if mine == other:
                members.append(name)
                break
        else:
            found.append((mine, [name]))
    return [members for _, members in found if len(members) >= _MINIMUM]


def _outer_block(name: str, blocks: set[str]) -> str | None:
    """Return the outermost block that a tensor or module lies in, or ``None``."""
    parts = name.split(".")
    return next((block for n in range(1, len(parts)) if (block := ".".join(parts[:n])) in blocks), None)


def _statements(group: Group, blocks: set[str], name: str) -> Iterator[tuple[str, Any]]:
    """Yield what a group says of each block, in terms of the block. ``name`` tells groups of several blocks apart."""
    shared = (name, group.kind, group.n_units, group.blocks, group.multiple, group.min_units, group.locked is None)
    for piece in group.slices:
        if (block := _outer_block(piece.tensor, blocks)) is not None:
            place = (piece.tensor[len(block) :], piece.axis, piece.passive)
            yield block, (shared, place, _numbers(piece.index), _numbers(piece.unit))
    for attribute in group.attributes:
        if (block := _outer_block(f"{attribute.module}.", blocks)) is not None:
            counter = (attribute.module[len(block) :], attribute.name, attribute.item)
            yield block, (shared, counter, _numbers(attribute.index), _numbers(attribute.unit))


def _numbers(index: Index) -> Any:
    return index if isinstance(index, range) else bytes(as_tensor(index).numpy())


def _shapes_by_block(model: nn.Module, blocks: set[str]) -> dict[str, dict[str, Any]]:
    """Return names, shapes and types of the tensors of each block. A block with tensors of another one has none."""
    found: dict[str, dict[str, Any]] = {name: {} for name in blocks}
    owner: dict[int, str | None] = {}
    tied = set()
    for name, tensor in all_tensors(model).items():
        block = _outer_block(name, blocks)
        if owner.setdefault(id(tensor), block) != block:
            tied |= {owner[id(tensor)], block}
        if block is not None:
            found[block][name[len(block) :]] = (tuple(tensor.shape), tensor.dtype, tensor.device)
    return {name: {} if name in tied else shapes for name, shapes in found.items()}


def copy_with_shared_blocks(model: nn.Module, repeated: RepeatedBlocks, dtype: torch.dtype) -> nn.Module:
    """Return a copy in ``dtype`` whose repeated blocks share tensors. Tensors on the meta device get values."""
    stored = all_tensors(model)
    memo: dict[int, Any] = {}
    uses = dict(repeated.sharing())
    blocks = set(uses)
    for name, tensor in stored.items():
        block = _outer_block(name, blocks)
        if block is None and id(tensor) not in memo:
            memo[id(tensor)] = _converted(tensor, dtype)
    for name, tensor in stored.items():
        if (block := _outer_block(name, blocks)) is not None:
            memo[id(tensor)] = memo[id(stored[uses[block] + name[len(block) :]])]
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and (value.is_meta or not value.is_leaf):
                memo.setdefault(id(value), _converted(value, value.dtype))
    return copy.deepcopy(model, memo)


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy in ``dtype``, if it holds real numbers. One without values gets some: 1 or True, or index 0."""
    target = dtype if tensor.is_floating_point() else tensor.dtype
    if tensor.is_meta:
        whole = tensor.dtype == torch.bool or not (tensor.is_floating_point() or tensor.is_complex())
        fill = float(tensor.dtype == torch.bool) if whole else 1.0
        made = torch.full(tensor.shape, fill, dtype=target, device="cpu")
    else:
        made = tensor.detach().to(target, copy=True)
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def count_numbers(model: nn.Module, repeated: RepeatedBlocks) -> int:
    """Return how many numbers the tensors of :func:`copy_with_shared_blocks` hold."""
    shared = set(dict(repeated.sharing()))
    return sum(tensor.numel() for name, tensor in named_tensors(model) if _outer_block(name, shared) is None)
