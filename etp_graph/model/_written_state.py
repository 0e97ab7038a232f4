"""Undo what a forward writes to its model: attributes, caches, hooks and values of tensors.

A forward may keep what it computed (``if self.features is None: self.features = ...``). A trace skips large products,
so what it would leave in such a cache is wrong, and after surgery even the right value would be that of another model.
"""

from __future__ import annotations

import types
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from ._undone import undone

_STRUCTURE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")

_INTERNAL = frozenset(vars(nn.Module()))
"""Attributes that every module has. Those of them that a forward may write are the structure."""

_HOOKS = tuple(name for name in sorted(_INTERNAL) if name.startswith(("_forward_", "_backward_")))
"""Tables of hooks. Models of transformers register hooks in their first forward, and an attribute says so."""

_OPAQUE = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType, nn.Module, Tensor)

_CONTAINERS = (list, dict, set, OrderedDict, defaultdict)
"""Subclasses of these may forbid what undoing needs, and are treated as objects."""

_DEPTH = 3
"""How many levels of containers and objects below an attribute are looked at."""

_LONG = 10_000
"""Containers with more entries are tables of data (a vocabulary), which a forward does not write."""


class ModelState:
    """The state of a model before a forward.

    A module that the first forward builds (it gets tensors, or tensors of other shapes) stays built: the names and
    shapes of a plan are those of the built model. Lazy modules of PyTorch are never undone.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [module for module in model.modules() if not isinstance(module, LazyModuleMixin)]
        self._modules = [_ModuleState(module) for module in modules]
        self._parts: dict[int, _Contents] = {}
        for module in modules:
            self._collect([v for name, v in vars(module).items() if name not in _INTERNAL], _DEPTH, whole=True)
        self._by_storage: dict[int, list[Tensor]] = {}
        for tensor in self._tensors():
            if (storage := _storage_of(tensor)) is not None:
                self._by_storage.setdefault(storage, []).append(tensor)
        self._values: dict[int, tuple[Tensor, Tensor]] = {}

    def _collect(self, values: Iterable[Any], depth: int, *, whole: bool) -> None:
        """Note the contents of containers and objects, ``depth`` levels deep.

        Args:
            values: what the attributes hold.
            depth: levels.
            whole: undo any change. Else only of entries that are tensors: objects may belong to other models, too.
        """
        for value in values:
            inside = _entries(value)
            if inside is None or id(value) in self._parts or len(inside) > _LONG:
                continue
            own = whole and type(value) in (*_CONTAINERS, tuple)
            if not isinstance(value, tuple):
                self._parts[id(value)] = _Contents(value, own)
            if depth > 1:
                self._collect(inside.values() if isinstance(inside, dict) else list(inside), depth - 1, whole=own)

    def _tensors(self) -> Iterator[Tensor]:
        for state in self._modules:
            yield from (value for value in state.values() if isinstance(value, Tensor))
        for part in self._parts.values():
            yield from (value for value in part.values() if isinstance(value, Tensor))

    def save_before_write(self, func: Any, args: Any, kwargs: Any) -> None:
        """Copy the tensors of the model that an operator is about to overwrite."""
        for position, name in _written(func):
            value = args[position] if position < len(args) else kwargs.get(name)
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                storage = _storage_of(tensor) if self._by_storage and isinstance(tensor, Tensor) else None
                for stored in self._by_storage.get(storage, ()) if storage is not None else ():
                    if id(stored) not in self._values:
                        self._values[id(stored)] = (stored, stored.detach().clone())

    def built_tensors(self) -> list[Tensor]:
        """Return the tensors of the modules that the forward built, as attributes or stored tensors."""
        built = [state.module for state in self._modules if state.is_built()]
        return [t for module in built for t in (*vars(module).values(), *_stored(module)) if isinstance(t, Tensor)]

    def kept_tensors(self) -> dict[tuple[int, int], Tensor]:
        """Return the tensors that the forward overwrote, or wrote to attributes, buffers, containers and objects.

        The key changes if a later forward writes the tensor again.
        """
        parts: list[_ModuleState | _Contents] = [*self._modules, *self._parts.values()]
        written = [value for part in parts for value in part.written()]
        tensors = [tensor for value in written for tensor in _tensors_in(value, _DEPTH)]
        tensors += [tensor for tensor, _ in self._values.values()]
        return {(id(tensor), tensor._version): tensor for tensor in tensors}

    def restore(self, *, keep_built: bool) -> None:
        """Undo what was written.

        Args:
            keep_built: leave the modules that the forward built as they are now.
        """
        with torch.no_grad():
            for tensor, value in self._values.values():
                tensor.copy_(value)
        for state in self._modules:
            if not (keep_built and state.is_built()):
                state.restore()
        for part in self._parts.values():
            part.restore()


@contextmanager
def restored_state(model: nn.Module) -> Iterator[ModelState]:
    """Undo what is written to the model inside. After an exception built modules, too, are as they were."""
    state, succeeded = ModelState(model), False
    with undone(lambda: state.restore(keep_built=succeeded)):
        yield state
        succeeded = True


class _ModuleState:
    """Attributes, structure and hooks of one module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._attributes = {name: value for name, value in vars(module).items() if name not in _INTERNAL}
        tables = (*_STRUCTURE, *(name for name in _HOOKS if name in vars(module)))
        self._structure = [_Contents(vars(module)[name], True) for name in tables]
        self._signature = _signature(module)

    def values(self) -> list[Any]:
        """Return the stored tensors and what the attributes held."""
        return [*self._attributes.values(), *(value for part in self._structure[:2] for value in part.values())]

    def written(self) -> list[Any]:
        """Return what attributes, parameters and buffers hold now and did not before."""
        now = {name: value for name, value in vars(self.module).items() if name not in _INTERNAL}
        own = [new for _, new in _changed(self._attributes, now)]
        return [*own, *(value for part in self._structure[:2] for value in part.written())]

    def is_built(self) -> bool:
        """Return True if names or shapes of tensors, or submodules, are others now."""
        return _signature(self.module) != self._signature

    def restore(self) -> None:
        """Undo what was written to attributes, structure and hooks."""
        now = vars(self.module)
        for name in [name for name in now if name not in _INTERNAL and name not in self._attributes]:
            del now[name]
        now.update(self._attributes)
        for part in self._structure:
            part.restore()


class _Contents:
    """The entries of a container, or the attributes of an object."""

    def __init__(self, holder: Any, whole: bool) -> None:
        self._holder = holder if type(holder) in _CONTAINERS else vars(holder)
        self._before = self._holder.copy()
        self._whole = whole

    def values(self) -> list[Any]:
        """Return the entries as they were."""
        return list(self._before.values() if isinstance(self._before, dict) else self._before)

    def written(self) -> list[Any]:
        """Return the entries that are there now and were not before."""
        return [new for _, new in _changed(self._before, self._holder)]

    def restore(self) -> None:
        """Put the entries back, if they are others now."""
        changed = _changed(self._before, self._holder)
        if not changed or not (self._whole or any(isinstance(value, Tensor) for pair in changed for value in pair)):
            return
        if isinstance(self._holder, list):
            self._holder[:] = self._before
        else:
            self._holder.clear()
            self._holder.update(self._before)


_MISSING = object()


def _changed(before: Any, now: Any) -> list[tuple[Any, Any]]:
    """Return the entries, before and now, that are not the same objects in two containers of one type."""
    if isinstance(before, set):
        return [*((old, _MISSING) for old in before - now), *((_MISSING, new) for new in now - before)]
    olds, news = (c if isinstance(c, dict) else dict(enumerate(c)) for c in (before, now))
    found = [(olds.get(name, _MISSING), news.get(name, _MISSING)) for name in {**olds, **news}]
    return [(old, new) for old, new in found if old is not new]


def _tensors_in(value: Any, depth: int) -> list[Tensor]:
    """Return the tensors in a value, in containers and objects down to some depth."""
    if isinstance(value, Tensor):
        return [value]
    inside = _entries(value) if depth else None
    entries = inside.values() if isinstance(inside, dict) else inside or ()
    return [tensor for entry in entries for tensor in _tensors_in(entry, depth - 1)]


def _entries(value: Any) -> Any:
    """Return what a container or an object holds; ``None`` for anything else."""
    if type(value) in (*_CONTAINERS, tuple):
        return value
    own = None if isinstance(value, _OPAQUE) else getattr(value, "__dict__", None)
    return own if isinstance(own, dict) else None


def _stored(module: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]


def _signature(module: nn.Module) -> list[tuple[Any, ...]]:
    """Return names and shapes of the tensors of a module, and its submodules."""
    tensors = [(n, t) for held in (module._parameters, module._buffers) for n, t in held.items() if t is not None]
    shapes = [(name, None if is_lazy(tensor) else tuple(tensor.shape)) for name, tensor in tensors]
    return [*shapes, *((name, id(child)) for name, child in module._modules.items())]


def _storage_of(tensor: Tensor) -> int | None:
    """Return the address of the memory of a tensor; ``None`` if it has none of its own."""
    if tensor.is_meta or tensor.layout != torch.strided or is_lazy(tensor) or type(tensor) not in _PLAIN:
        return None
    return tensor.untyped_storage().data_ptr() or None


_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Return position and name of the arguments that an operator overwrites."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)
