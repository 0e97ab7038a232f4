"""Rows by class, fallback rows; fallbacks register themselves (that opens the circle)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from torch import nn

_TABLES = ("_pytorch", "_huggingface", "_timm", "_pyg", "_norms", "_experts", "_reshapes")
"""The modules of this package that declare rows; loaded when the first model is traced."""

StandIn = type[nn.Module]

M = TypeVar("M", bound=StandIn)


@dataclass(frozen=True, slots=True)
class Row:
    """What stands in for the modules of a class.

    Attributes:
        find: module -> the class that stands in for it, or ``None`` if this module needs none.
        view: it stands in only while the library looks at the model.
        of_class: class -> the class that stands in for it, for unpickling, where a module has no attributes yet.
    """

    find: Callable[[nn.Module], StandIn | None]
    view: bool = False
    of_class: Callable[[StandIn], StandIn | None] | None = None


ROWS: dict[str, Row] = {}


def class_name(cls: type) -> str:
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
    ROWS[original if isinstance(original, str) else class_name(original)] = row


FALLBACKS: list[Row] = []
"""Rows of classes that have none: asked in this order, the first that finds a stand-in is taken."""


def register_fallback(row: Row) -> None:
    """Declare a row that is asked for modules of every class that has no row of its own, after the earlier ones."""
    FALLBACKS.append(row)


@cache
def load_rows() -> None:
    for table in _TABLES:
        importlib.import_module(f"{__package__}.{table}")


def standin(module: nn.Module) -> tuple[StandIn, bool] | None:
    """The class that stands in for a module and whether it is a view; ``None`` if there is none."""
    load_rows()
    for row in (ROWS.get(class_name(type(module))), *FALLBACKS):
        found = row.find(module) if row is not None else None
        if row is not None and found is not None:
            return found, row.view
    return None
