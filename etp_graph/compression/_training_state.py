"""What ``train`` may change in a model besides its weights: kept with each step, and restored when a run continues.

These are buffers that are not persistent, ``requires_grad`` of parameters, the memory format of tensors, and plain
attributes of modules (the rate of a dropout). Other attributes, such as caches and functions, are not kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph._config import quoted
from etp_graph.errors import CheckpointError
from etp_graph.model import all_tensors, persistent_names
from etp_graph.surgery import get_record, replace_data

BUFFER = "buffer:"
"""Prefix of the names under which buffers are stored."""

_PLAIN = (bool, int, float, str, type(None))

_LONGEST = 1000

_HIDDEN = frozenset(vars(nn.Module()))


class TrainingState:
    """The state of a model before a run, with which later states are compared.

    Args:
        model: the model as the user passed it; it must be the same when a run continues.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes = {name: _plain_attributes(module) for name, module in model.named_modules()}
        self._classes = {name: type(module) for name, module in model.named_modules()}
        self._trainable = {name: p.requires_grad for name, p in model.named_parameters()}

    def describe(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what differs now, as values that JSON can store, and the buffers that no checkpoint stores."""
        record, tensors = get_record(model), all_tensors(model)
        edited = {(edit.module, edit.name) for edit in record.edits}
        attributes = {
            name: changed
            for name, module in model.named_modules()
            if (changed := {
                key: value for key, value in _plain_attributes(module).items()
                if (name, key) not in edited and self._differs(name, key, value)
            })
        }  # fmt: skip
        swapped = [
            name for name, module in model.named_modules()
            if type(module) is not self._classes.get(name) and name not in record.standins
        ]  # fmt: skip
        stored = persistent_names(model) | set(record.tensors)
        buffers = {
            BUFFER + name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in model.named_buffers()
            if name not in stored and not tensor.is_meta and tensor.layout == torch.strided
        }
        state = {
            "attributes": attributes,
            "replaced": swapped,
            "trainable": {
                name: p.requires_grad for name, p in model.named_parameters()
                if p.requires_grad != self._trainable.get(name)
            },
            "orders": {name: _order(tensor) for name, tensor in tensors.items() if tensor.layout == torch.strided},
        }  # fmt: skip
        return state, buffers

    def _differs(self, module: str, name: str, value: Any) -> bool:
        missing = object()
        before = self._attributes.get(module, {}).get(name, missing)
        return type(before) is not type(value) or before != value


def require_restorable(state: Any) -> None:
    """Raise :class:`CheckpointError` if a state is damaged, or tells of modules that ``train`` replaced."""
    if state is None:
        return
    try:
        sound = all(isinstance(state[name], Mapping) for name in ("attributes", "trainable", "orders"))
        replaced = [str(name) for name in state["replaced"]]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the state of the training is damaged ({error!r}): use another folder.") from error
    if not sound:
        raise CheckpointError("the state of the training is damaged: restore the folder, or use another.")
    if replaced:
        raise CheckpointError(
            f"train replaced {quoted(replaced)} by modules of another class, which a checkpoint cannot store: make "
            "that change before compress, or use another folder."
        )


def restore_training_state_(model: nn.Module, state: Any, kept: Mapping[str, Tensor]) -> None:
    """Give a model whose weights are restored the rest of its state.

    Args:
        model: the model, as after surgery.
        state: the first result of :meth:`TrainingState.describe`; ``None`` for a run of version 0.1.0, which has none.
        kept: the second result, among other tensors.

    Raises:
        CheckpointError: the state does not fit the model, or a module was replaced, which cannot be restored. Nothing
            has changed then.
    """
    if state is None:
        return
    attributes, trainable, orders = _checked(model, state)
    buffers = _checked_buffers(model, kept)
    modules, parameters, tensors = dict(model.named_modules()), dict(model.named_parameters()), all_tensors(model)
    for path, values in attributes.items():
        for name, value in values.items():
            setattr(modules[path], name, tuple(value) if isinstance(value, list) else value)
    for name, flag in trainable.items():
        parameters[name].requires_grad_(flag)
    with torch.no_grad():
        for name, value in buffers.items():
            tensors[name].copy_(value)
        for name, order in orders.items():
            tensor = tensors[name]
            if _order(tensor) != order:
                made = torch.empty_permuted(tensor.shape, order, dtype=tensor.dtype, device=tensor.device)
                replace_data(tensor, made.copy_(tensor))


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that hold plain values, or tuples of them."""
    if isinstance(module, torch.jit.ScriptModule):
        return {}
    return {n: v for n, v in vars(module).items() if n not in _HIDDEN and not n.startswith("_") and _is_plain(v)}


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return len(value) <= _LONGEST and all(_is_plain(item) and type(item) is not tuple for item in value)
    return type(value) in _PLAIN and (type(value) is not float or math.isfinite(value))


def _order(tensor: Tensor) -> list[int]:
    """Return the axes of a tensor from the one with the largest stride to the one with the smallest."""
    return sorted(range(tensor.ndim), key=lambda axis: (-tensor.stride()[axis], axis))


def _checked(model: nn.Module, state: Any) -> tuple[dict[str, dict[str, Any]], dict[str, bool], dict[str, list[int]]]:
    """Return the three parts of a state, or raise :class:`CheckpointError`."""
    require_restorable(state)
    attributes, trainable, orders = (dict(state[name]) for name in ("attributes", "trainable", "orders"))
    modules, parameters, tensors = dict(model.named_modules()), dict(model.named_parameters()), all_tensors(model)
    sound = all(_fit(modules.get(path), values) for path, values in attributes.items())
    sound &= all(name in parameters and isinstance(flag, bool) for name, flag in trainable.items())
    sound &= all(name in tensors and _is_order(order, tensors[name].ndim) for name, order in orders.items())
    if not sound:
        raise CheckpointError("the state of the training does not fit the model: restore the folder, or use another.")
    return attributes, trainable, orders


def _fit(module: nn.Module | None, values: Any) -> bool:
    """Return True if all values are plain, and take the place of plain ones or of none."""
    if module is None or not isinstance(values, Mapping):
        return False
    return all(
        isinstance(name, str) and name.isidentifier() and not name.startswith("_") and name not in _HIDDEN
        and (name in vars(module) or not hasattr(type(module), name)) and _is_plain(vars(module).get(name))
        and _is_plain(tuple(value) if isinstance(value, list) else value)
        for name, value in values.items()
    )  # fmt: skip


def _is_order(order: Any, ndim: int) -> bool:
    return isinstance(order, list) and all(type(axis) is int for axis in order) and sorted(order) == list(range(ndim))


def _checked_buffers(model: nn.Module, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the stored buffers by name, or raise :class:`CheckpointError` if one does not fit."""
    own = dict(model.named_buffers())
    found = {name.removeprefix(BUFFER): value for name, value in kept.items() if name.startswith(BUFFER)}
    for name, value in found.items():
        if name not in own or own[name].shape != value.shape or own[name].dtype != value.dtype:
            raise CheckpointError(f"the stored buffer {name!r} does not fit the model: use another folder.")
    return found
