"""Integers that store the module attribute that they were read from.

During a trace, equal integers with their origin replace the integer attributes of the modules. If a forward calls
``x.view(b, t, self.num_heads, self.head_dim)``, the tracer then knows which attribute gives the size of which axis.
Surgery lowers exactly these attributes. No table of attribute names per architecture is needed.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from etp_graph.model import as_count, sizes_of_class, undone

from ._traced_numbers import Numbers, Origin, SizeInt, TracedInt, noted_numbers


class CountedInt(TracedInt):
    """Integer with its origin.

    Attributes:
        origin: the module attribute that the integer was read from; ``None`` if it was computed from such integers, or
            if a cache of a function kept it from the trace of another model.
        whole: the integer that this one is an equal part of (``self.embed_dim`` for ``self.embed_dim // 4``), or
            ``None``.
    """

    _origin: Origin | None
    whole: TracedInt | None

    def __new__(cls, value: int, origin: Origin | None = None, whole: TracedInt | None = None) -> CountedInt:
        """Return the integer ``value``, read from ``origin`` or computed as an equal part of ``whole``."""
        made = super().__new__(cls, value, frozenset((origin,)) if origin is not None else frozenset())
        assert isinstance(made, CountedInt)
        made._origin, made.whole = origin, whole
        return made

    @property
    def origin(self) -> Origin | None:
        """The module attribute, see above."""
        return self._origin if self.alive else None

    @property
    def is_read(self) -> bool:
        """Whether the integer was read from an attribute, not computed."""
        return self._origin is not None


def is_counted(value: Any) -> TypeGuard[CountedInt]:
    """Return True for an integer of the model that is traced."""
    return isinstance(value, CountedInt) and value.alive


def read_size(value: Any) -> int | None:
    """Return the number of the size of an activation that an integer is, see :meth:`Numbers.read`; else ``None``."""
    if not isinstance(value, SizeInt) or not value.alive:
        return None
    (source,) = value.sources
    return source if isinstance(source, int) else None


def _derive(self: TracedInt, value: int, other: Any, *, part: bool) -> CountedInt:
    made = CountedInt(value, whole=self if part else None)
    made.sources = self.sources | getattr(other, "sources", frozenset())
    return made


def _derived(name: str) -> Callable[[TracedInt, Any], Any]:
    plain = getattr(TracedInt, name)

    def operation(self: TracedInt, other: Any) -> Any:
        value = plain(self, other)
        if not isinstance(value, TracedInt):
            return value
        counted = isinstance(self, CountedInt) or isinstance(other, CountedInt)
        read = getattr(self, "is_read", False)
        part = name == "__floordiv__" and read and bool(other) and int.__mod__(self, other) == 0
        if not (counted or part):
            return value
        made = _derive(self, int(value), other, part=part)
        made.note_steps(getattr(int, name), self, other)
        return made

    return operation


for _name in ("mul", "rmul", "floordiv", "rfloordiv", "add", "radd", "sub", "rsub"):
    for _kind in (CountedInt, SizeInt):
        setattr(_kind, f"__{_name}__", _derived(f"__{_name}__"))


@contextmanager
def counted_sizes(model: nn.Module) -> Iterator[Numbers]:
    """Inside this context, give integers above 1 in attributes of modules their origin, also in tuples and lists.

    Yields the uses of these integers, which :mod:`etp_graph.graph._traced_numbers` notes.
    """
    with noted_numbers(model) as numbers, _marked_attributes(model):
        yield numbers


@contextmanager
def _marked_attributes(model: nn.Module) -> Iterator[None]:
    before: list[tuple[nn.Module, str, Any]] = []
    of_class: list[tuple[nn.Module, str, int]] = []

    def restore() -> None:
        for module, name, value in before:
            if _same(module.__dict__.get(name), value):  # else a forward has set another value, which stays
                module.__dict__[name] = value
        for module, name, value in of_class:
            if _same(module.__dict__.get(name), value):
                del module.__dict__[name]
        _forget_origins(model)

    with undone(restore):
        for module_name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            for name, value in sizes_of_class(module.__class__).items():
                if name not in module.__dict__:
                    of_class.append((module, name, value))
                    module.__dict__[name] = CountedInt(value, (module_name, name, None))
            for name, value in list(module.__dict__.items()):
                marked = None if name.startswith("_") else _marked(value, (module_name, name))
                if marked is not None:
                    before.append((module, name, int(value) if isinstance(value, CountedInt) else value))
                    module.__dict__[name] = marked
        yield


_DEPTH, _LONG = 3, 10_000
"""Levels of containers and objects below an attribute that are looked at, and entries of a container at most."""

_OPAQUE = (type, types.ModuleType, types.FunctionType, types.MethodType, nn.Module, Tensor)


def _forget_origins(model: nn.Module) -> None:
    """Turn integers that a forward computed from counted ones and kept (``self.calls += 1``) into plain ones."""
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            _make_plain(vars(module), _DEPTH)


def _make_plain(holder: dict[Any, Any] | list[Any], depth: int) -> None:
    """Replace the entries of a dictionary or list that are, or hold, integers with an origin."""
    entries = list(holder.items() if isinstance(holder, dict) else enumerate(holder))
    for key, value in entries if len(entries) <= _LONG else ():
        plain = _plain(value, depth)
        if plain is not value:
            holder[key] = plain
    if isinstance(holder, dict) and any(type(key) is CountedInt for key in holder):
        items = [(int(key) if type(key) is CountedInt else key, value) for key, value in holder.items()]
        holder.clear()
        holder.update(items)


def _plain(value: Any, depth: int) -> Any:
    """Return the value, or a plain one in its place. Dictionaries, lists and objects are changed in place."""
    if type(value) is CountedInt:
        return int(value)
    if depth == 0 or isinstance(value, _OPAQUE):
        return value
    if type(value) in (tuple, set):
        items = [_plain(item, depth - 1) for item in value] if len(value) <= _LONG else []
        changed = any(new is not old for new, old in zip(items, value, strict=False))
        return type(value)(items) if changed else value
    inside = value if type(value) in (dict, list) else getattr(value, "__dict__", None)
    if isinstance(inside, (dict, list)):
        _make_plain(inside, depth - 1)
    return value


def _marked(value: Any, key: tuple[str, str]) -> Any:
    """Return what replaces an attribute: a number, or a tuple or list of numbers, with origins; else ``None``."""
    if isinstance(value, Tensor):
        return None  # a counter, say, whose methods the code may call
    if type(value) in (tuple, list) and value and all(as_count(item) is not None for item in value):
        counts = [as_count(item) or 0 for item in value]
        return type(value)(CountedInt(n, (*key, i)) if n > 1 else n for i, n in enumerate(counts))
    count = as_count(value)  # also of a number with an origin: an earlier forward stored a size that it read
    return CountedInt(count, (*key, None)) if count is not None and count > 1 else None


def _same(now: Any, value: Any) -> bool:
    return type(now) in (CountedInt, tuple, list) and now == value


@dataclass(slots=True)
class Sizes:
    """Sizes among the arguments of a call: those of its result, or those of the pieces that it takes from its operand.

    Attributes:
        named: for each dimension of the result the integer in the call; 0 if the call passes something else.
        pieces: dimension of the operand -> (start, stop) of the slice, or the sizes of the pieces of a split.
        sliced: the sliced dimensions, as numbered when the slices of ``pieces`` are taken one after the other.
        parts: whether the operand is split into equal parts of a size that an attribute counts.
        follow: the sliced dimensions of the operand whose ends are read from attributes or from sizes of activations.
        copies: the dimension of the operand whose positions are repeated, and how often.
        tiled: whether all positions together are repeated, not one by one.
    """

    named: Sequence[int] = ()
    pieces: dict[int, tuple[Any, ...]] | None = None
    sliced: set[int] = field(default_factory=set)
    parts: bool = False
    follow: set[int] = field(default_factory=set)
    copies: tuple[int, Any] | None = None
    tiled: bool = False

    def follows(self, dim: int) -> bool | None:
        """Return True if the call gives the size of a dimension as -1 or by an attribute; ``None`` if it gives none."""
        if dim >= len(self.named):
            return None
        return int(self.named[dim]) == -1 or is_counted(self.named[dim])


def written_sizes(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Sizes | None:
    """Return the sizes in a call that moves, splits, slices or creates a tensor; ``None`` for any other function."""
    name = getattr(func, "__name__", "")
    if name in _MAKERS:
        return _view(None, args[:1] if name == "full" else args, kwargs)
    if name in NEW:
        return _view(None, args[1:2] if name == "new_full" else args[1:], kwargs)
    reader = _READERS.get(name)
    if reader is None or not args or not isinstance(args[0], Tensor):
        return None
    return reader(args[0], args[1:], kwargs)


def _view(x: Tensor | None, args: Sequence[Any], kwargs: dict[str, Any]) -> Sizes | None:
    sizes: Any = args or kwargs.get("size", kwargs.get("shape", ()))
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = sizes[0]
    if not isinstance(sizes, (tuple, list)):
        return None
    return Sizes(tuple(size if isinstance(size, int) else 0 for size in sizes))


def _unflatten(x: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Sizes | None:
    dim, sizes = (*args, *kwargs.values())[:2]
    if not isinstance(dim, int):
        return None
    dim %= x.ndim
    return Sizes((*(0 for _ in range(dim)), *sizes, *(0 for _ in range(dim + 1, x.ndim))))


def _split(x: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Sizes | None:
    names = ("split_size_or_sections", "split_size", "split_sizes")
    sizes: Any = args[0] if args else next((kwargs[name] for name in names if name in kwargs), ())
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % x.ndim
    equal = False
    if isinstance(sizes, int):
        if is_counted(sizes) and sizes.whole is not None and int(sizes.whole) == x.shape[dim]:
            return Sizes(pieces={dim: (0, sizes.whole)}, parts=True)
        if is_counted(sizes) and sizes.origin is None:
            return None
        equal = type(sizes) is int  # a width that is a plain number, unlike the number of pieces of ``chunk``
        rest = x.shape[dim] % sizes
        sizes = [sizes] * (x.shape[dim] // sizes) + ([CountedInt(rest)] if rest else [])
    if sum(sizes) != x.shape[dim]:
        return None
    return Sizes(pieces={dim: tuple(sizes)}) if _counted(sizes) or (equal and len(sizes) > 1) else None


def _getitem(x: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Sizes | None:
    entries = args[0] if isinstance(args[0], tuple) else (args[0],)
    if any(not (e is None or e is Ellipsis or isinstance(e, (int, slice))) for e in entries):
        return None
    used = sum(e is not None and e is not Ellipsis for e in entries)
    found = Sizes(pieces={})
    dim = shift = 0  # shift: an integer removes its dimension from the result, None adds one
    for entry in entries:
        if entry is Ellipsis:
            dim += x.ndim - used
        elif entry is None:
            shift += 1
        elif isinstance(entry, slice):
            ends = (entry.start or 0, entry.stop)
            if isinstance(entry.stop, TracedInt):
                found.follow.add(dim)
            if entry.step in (None, 1) and _counted(ends) and all(e in (0, None) or _counted((e,)) for e in ends):
                found.pieces[dim] = ends  # type: ignore[index]
                found.sliced.add(dim + shift)
            dim += 1
        else:
            dim, shift = dim + 1, shift - 1
    return found if found.pieces or found.follow else None


def _narrow(x: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Sizes | None:
    given = dict(zip(("dim", "start", "length"), args, strict=False)) | kwargs
    dim, start, length = given["dim"] % x.ndim, given["start"], given["length"]
    if isinstance(start, Tensor):
        return None
    end = length if not isinstance(start, TracedInt) and start == 0 else start + length
    return _getitem(x, ((*(slice(None) for _ in range(dim)), slice(start, end)),), {})


def _copies(x: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Sizes | None:
    given = dict(zip(("repeats", "dim"), args, strict=False)) | kwargs
    times, dim = given.get("repeats"), given.get("dim")
    return Sizes(copies=(dim % x.ndim, times)) if isinstance(dim, int) and is_counted(times) else None


def _tiles(x: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Sizes | None:
    times: Any = args or kwargs.get("repeats", ())
    if len(times) == 1 and isinstance(times[0], (tuple, list)):
        times = times[0]
    more = [dim for dim, n in enumerate(times) if not isinstance(n, int) or n != 1]
    if len(times) != x.ndim or len(more) != 1 or not is_counted(times[more[0]]):
        return None
    return Sizes(copies=(more[0], times[more[0]]), tiled=True)


def _counted(values: Sequence[Any] | None) -> bool:
    return any(is_counted(value) for value in values or ())


_READERS: dict[str, Callable[[Any, Sequence[Any], dict[str, Any]], Sizes | None]] = {
    "view": _view, "reshape": _view, "expand": _view, "unflatten": _unflatten, "split": _split,
    "split_with_sizes": _split, "__getitem__": _getitem, "narrow": _narrow, "repeat_interleave": _copies,
    "repeat": _tiles, "broadcast_to": _view,
}  # fmt: skip

NEW = frozenset(("new_zeros", "new_ones", "new_empty", "new_full"))
"""Methods that make a tensor of the type of another one. Their sizes have nothing to do with it."""

_MAKERS = frozenset("zeros ones empty randn rand full".split())
