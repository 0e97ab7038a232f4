"""Stand-ins made by changing a method or its source."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ._registry import FALLBACKS, ROWS, Row, StandIn, class_name, load_rows, register_row


def overrides(original: str, *, view: bool = False, **methods: Callable[..., Any]) -> None:
    """Declare a subclass of ``original`` with other methods as its stand-in, without importing ``original``."""
    found: dict[type, StandIn] = {}

    def find(module: nn.Module) -> StandIn:
        cls = type(module)
        if cls not in found:
            found[cls] = subclass(cls, methods)
        return found[cls]

    register_row(original, Row(find, view))


def rewrite(
    original: str,
    *changes: tuple[str, str],
    methods: Sequence[str] = ("forward",),
    functions: Sequence[str] = (),
    keep: Mapping[str, str] | None = None,
) -> None:
    """Declare a stand-in that is made by replacing pieces of the source of the original's methods.

    It is for small repairs such as ``reshape(B, N, C)`` to ``reshape(B, N, -1)``. If a piece is not found (another
    version of the library), there is no stand-in, and the check locks the units that the original cannot lose.

    Args:
        original: full name of the class.
        changes: pairs (old source, new source).
        methods: names of the methods to change.
        functions: names of functions in the module of ``original`` to change, too.
        keep: new attribute -> attribute whose value before surgery it stores (``{"all_heads": "heads"}``). The new
            source reads it with ``kept(self, "all_heads", self.heads)``, because it does not exist before surgery.
    """
    found: dict[type, StandIn | None] = {}

    def find(module: nn.Module) -> StandIn | None:
        cls = type(module)
        if cls not in found:
            found[cls] = _rewritten(cls, changes, methods, functions, dict(keep or {}))
        return found[cls]

    register_row(original, Row(find))


def subclass(cls: StandIn, body: Mapping[str, Any]) -> StandIn:
    """Return a subclass of ``cls`` with this body. Its instances can be pickled, because they refer to ``cls`` only."""

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return unpickled_instance, (cls,), self.__dict__

    return type(f"Prunable{cls.__name__}", (cls,), {**body, "__module__": __name__, "__reduce_ex__": reduce})


def unpickled_instance(cls: StandIn) -> nn.Module:
    """Return an empty instance of the stand-in for ``cls``."""
    load_rows()
    module: nn.Module = cls.__new__(cls)
    row = ROWS.get(class_name(cls))
    by_class = (fallback.of_class for fallback in FALLBACKS if fallback.of_class is not None)
    found = row.find(module) if row is not None else next(filter(None, (find(cls) for find in by_class)), None)
    if found is not None:
        module.__class__ = found
    return module


def value_before_surgery(module: nn.Module, name: str, now: Any) -> Any:
    """Return the value that an attribute had before surgery, stored as ``name``; ``now`` before surgery."""
    value = module.__dict__.get(name, now)
    return int(value) if isinstance(value, int) else value  # a plain one: surgery does not change it


def _rewritten(
    cls: type[nn.Module],
    changes: Sequence[tuple[str, str]],
    methods: Sequence[str],
    functions: Sequence[str],
    keep: dict[str, str],
) -> StandIn | None:
    body: dict[str, Any] = {"etp_keeps": keep}
    missing = set(changes)
    scope: dict[str, Any] = {}
    for name in (*functions, *methods):
        method = name in methods
        function = inspect.unwrap(getattr(cls, name) if method else getattr(cls, methods[0]).__globals__[name])
        try:
            source = textwrap.dedent(inspect.getsource(function))
        except OSError:  # source not available, as in frozen applications
            return None
        for old, new in changes:
            if old in source:
                source = source.replace(old, new)
                missing.discard((old, new))
        decorators, _, rest = source.partition("def ")
        above = function.__code__.co_firstlineno - 1 + decorators.count("\n")
        code = compile("\n" * above + "def " + rest, function.__code__.co_filename, "exec")  # lines keep their numbers
        world = {**function.__globals__, "kept": value_before_surgery, **scope}
        exec(code, world, body if method else scope)  # noqa: S102 - the library's source, changed by the row
    return None if missing else subclass(cls, body)
