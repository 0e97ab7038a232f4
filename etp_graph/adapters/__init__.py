"""Stand-ins: how a module would have been written for units that can go.

Most forwards need nothing: their operators are followed, and the attributes that they read say which sizes they count
(:mod:`etp_graph.sizes`). Some cannot be followed (a fused kernel, a hand-written norm), some cannot run with fewer
units (``reshape(batch, positions, channels)`` with the width of the *input*). A stand-in is another class for
such a module, with the same parameters and another ``forward``:

* a *view* stands in only while the library looks at the model: the tracer and the masked reference of the check;
* any other stand-in also takes the module's place when surgery changes it. The check compares it with the original.

Rows are declared in the modules of this package, in the user's code with :func:`register_standin`.
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from torch import nn

from ..errors import PlanError

_TABLES = ("attention", "huggingface", "timm", "graphs")
"""The modules of this package that declare rows; loaded when the first model is traced."""

StandIn = type[nn.Module]
M = TypeVar("M", bound=StandIn)


@dataclass(frozen=True, slots=True)
class Row:
    """What stands in for the modules of a class.

    Attributes:
        find: module -> the class that stands in for it, or ``None`` if this module needs none.
        view: it stands in only while the library looks at the model.
    """

    find: Callable[[nn.Module], StandIn | None]
    view: bool = False


_rows: dict[str, Row] = {}


def _key(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def register_standin(original: type[nn.Module] | str, *, view: bool = False) -> Callable[[M], M]:
    """Class decorator: the decorated class stands in for modules of class ``original``.

    It gets no instance of its own: the module's ``__class__`` is set, so it finds the attributes and parameters that
    ``original.__init__`` made, and must not add any. Sizes that units count have to be attributes of the module
    (or ``-1``), not widths of its input.

    Args:
        original: the exact class, or its full name (``"package.module.Class"``) where importing it costs too much.
        view: stand in only for the tracer and for the masked reference, not after surgery.
    """

    def register(standin: M) -> M:
        register_row(original, Row(lambda _: standin, view))
        return standin

    return register


def register_row(original: type[nn.Module] | str, row: Row) -> None:
    """Declare the row of a class, see :func:`register_standin`; a later one replaces an earlier one."""
    _rows[original if isinstance(original, str) else _key(original)] = row


def overrides(original: str, *, view: bool = False, **methods: Callable[..., Any]) -> None:
    """Declare a stand-in for a class that need not be imported: a subclass of it with other methods."""
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
    """Declare a stand-in whose methods, and functions of their module, have pieces of their source replaced.

    Made for one-word repairs such as ``reshape(B, N, C)`` to ``reshape(B, N, -1)``. Where a piece is not found (another
    version of the library) there is no stand-in, and what the original cannot lose is locked by the check.
    ``keep`` maps new attributes to those whose unpruned values they keep (``{"all_heads": "heads"}``); the new source
    reads them with ``kept(self, "all_heads", self.heads)``, because before surgery they do not exist.
    """
    found: dict[type, StandIn | None] = {}

    def find(module: nn.Module) -> StandIn | None:
        cls = type(module)
        if cls not in found:
            found[cls] = _rewritten(cls, changes, methods, functions, dict(keep or {}))
        return found[cls]

    register_row(original, Row(find))


def subclass(cls: StandIn, body: Mapping[str, Any]) -> StandIn:
    """A class made while running, whose instances can be pickled: they name the class that it was made from."""

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _instance, (cls,), self.__dict__

    return type(f"Prunable{cls.__name__}", (cls,), {**body, "__module__": __name__, "__reduce_ex__": reduce})


def _instance(cls: StandIn) -> nn.Module:
    """An empty instance of the class that stands in for ``cls``."""
    from .idioms import freed

    _load()
    module: nn.Module = cls.__new__(cls)
    row = _rows.get(_key(cls))
    found = row.find(module) if row is not None else freed(cls)
    if found is not None:
        module.__class__ = found
    return module


def kept(module: nn.Module, name: str, now: Any) -> Any:
    """The value that an attribute had before any surgery; ``now`` while there was none."""
    return module.__dict__.get(name, now)


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
        except OSError:  # no source at hand, as in frozen applications
            return None
        for old, new in changes:
            if old in source:
                source = source.replace(old, new)
                missing.discard((old, new))
        source = source[source.index("def ") :]  # without decorators
        code = compile(source, f"<{_key(cls)}.{name} of etp_graph>", "exec")
        world = {**function.__globals__, "kept": kept, **scope}
        exec(code, world, body if method else scope)  # noqa: S102 - the library's source, changed by the row
    return None if missing else subclass(cls, body)


def _recognised(module: nn.Module) -> StandIn | None:
    from .experts import experts_view
    from .norms import norm_standin

    return norm_standin(module) or experts_view(module)


def _idiom(module: nn.Module) -> StandIn | None:
    from .idioms import idiom_standin

    return None if _key(type(module)) in _rows else idiom_standin(module)


_OTHERS = (Row(_recognised, view=True), Row(_idiom))
"""Classes that have no row: norms are recognised by what they compute, experts by parameters, idioms by the source."""


@cache
def _load() -> None:
    for table in _TABLES:
        importlib.import_module(f"{__name__}.{table}")


def standin(module: nn.Module) -> tuple[StandIn, bool] | None:
    """The class that stands in for a module and whether it is a view; ``None`` if there is none."""
    _load()
    for row in (_rows.get(_key(type(module))), *_OTHERS):
        found = row.find(module) if row is not None else None
        if row is not None and found is not None:
            return found, row.view
    return None


@contextmanager
def standing_in(model: nn.Module, *, views_only: bool = False) -> Iterator[None]:
    """Inside, stand-ins have taken the places of all modules that have one, or of those that have a view."""
    before: list[tuple[nn.Module, StandIn]] = []
    try:
        for module in model.modules():
            found = standin(module)
            if found is not None and (found[1] or not views_only):
                before.append((module, type(module)))
                module.__class__ = found[0]
        yield
    finally:
        for module, cls in before:
            module.__class__ = cls


def replace_(model: nn.Module, names: Sequence[str]) -> None:
    """Give the named modules the classes that stand in for them, for good; before their attributes change.

    Raises:
        PlanError: a module has no stand-in: the code that registers it was not imported.
    """
    chosen = []
    for name in names:
        module = model.get_submodule(name)
        found = standin(module)
        if found is None or found[1]:
            raise PlanError(
                f"{name!r} ({_key(type(module))}) has no stand-in here: import the code that calls "
                "etp_graph.register_standin for it first."
            )
        chosen.append((module, found[0]))
    for module, cls in chosen:
        for name, source in getattr(cls, "etp_keeps", {}).items():
            module.__dict__.setdefault(name, getattr(module, source))
        module.__class__ = cls


def replaceable(model: nn.Module) -> Iterator[str]:
    """Names of the modules that surgery has to give another class if it changes them."""
    for name, module in model.named_modules():
        found = standin(module)
        if found is not None and not found[1]:
            yield name
