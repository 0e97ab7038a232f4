"""Give modules the class that stands in for theirs, for a while or for good."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from etp_graph.errors import PlanError
from etp_graph.model import undone

from ._registry import StandIn, class_name, standin


@contextmanager
def standing_in(model: nn.Module, *, views_only: bool = False) -> Iterator[None]:
    """Replace the classes of all modules by their stand-ins inside this context; with ``views_only``, only by views."""
    before: list[tuple[nn.Module, StandIn]] = []

    def restore() -> None:
        for module, cls in before:
            module.__class__ = cls

    with undone(restore):
        for module in model.modules():
            found = standin(module)
            if found is not None and (found[1] or not views_only):
                before.append((module, type(module)))
                module.__class__ = found[0]
        yield


def replace_(model: nn.Module, names: Sequence[str]) -> None:
    """Set the classes of the named modules to their stand-ins permanently. Call it before their attributes change.

    Raises:
        PlanError: a module has no stand-in, because the code that registers it was not imported.
    """
    chosen = []
    for name in names:
        module = model.get_submodule(name)
        found = standin(module)
        if found is None or found[1]:
            raise PlanError(
                f"{name!r} ({class_name(type(module))}) has no stand-in here: import the code that calls "
                "etp_graph.register_standin for it first."
            )
        chosen.append((module, found[0]))
    for module, cls in chosen:
        for name, source in getattr(cls, "etp_keeps", {}).items():
            module.__dict__.setdefault(name, getattr(module, source))
        module.__class__ = cls


def replaceable(model: nn.Module) -> Iterator[str]:
    """Yield the names of modules whose class surgery must replace if it changes them."""
    for name, module in model.named_modules():
        found = standin(module)
        if found is not None and not found[1]:
            yield name
