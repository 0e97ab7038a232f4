"""Rows by class, fallback rows; fallbacks register themselves (that opens the circle)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from torch import nn

_TABLES = ("_pytorch", "_huggingface", "_timm", "_pyg", "_norms", "_experts", "_reshapes")
"""Modules of this package that declare rows; they are imported at the first search for a stand-in."""

StandIn = type[nn.Module]

M = TypeVar("M", bound=StandIn)


@dataclass(frozen=True, slots=True)
class Row:
    """Stand-in for the modules of a class.

    Attributes:
        find: function that returns the stand-in of a module, or ``None`` if the module needs none.
        view: whether it is used only in the tracer and the masked reference, not after surgery.
    """

    find: Callable[[nn.Module], StandIn | None]
    view: bool = False
    of_class: Callable[[StandIn], StandIn | None] | None = None


ROWS: dict[str, Row] = {}


def class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def register_standin(original: type[nn.Module] | str, *, view: bool = False) -> Callable[[M], M]:
    """Declare the decorated class as the stand-in for modules of class ``original``.

    The library sets ``module.__class__`` to the stand-in and never calls its ``__init__``. The stand-in therefore has
    the attributes and parameters that ``original.__init__`` made, and must not need others. Sizes that depend on the
    number of units must be attributes of the module (or ``-1``), not widths of its input.

    Args:
        original: the exact class, or its full name (``"package.module.Class"``) if importing it would be slow.
        view: use the stand-in only in the tracer and the masked reference, not after surgery.
    """

    def register(standin: M) -> M:
        register_row(original, Row(lambda _: standin, view))
        return standin

    return register


def register_row(original: type[nn.Module] | str, row: Row) -> None:
    """Declare the row of a class, see :func:`register_standin`. A later row replaces an earlier one."""
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
    """Return the stand-in of a module and whether it is a view; ``None`` if there is none."""
    load_rows()
    own = ROWS.get(class_name(type(module)))
    if own is not None and (found := own.find(module)) is not None:
        return found, own.view
    if own is None and type(module).__module__.startswith("torch.nn.modules."):
        return None  # no fallback finds one, and a model has hundreds of such modules
    for row in FALLBACKS:
        if (found := _search(row, module)) is not None:
            return found, row.view
    return None


def _search(row: Row, module: nn.Module) -> StandIn | None:
    try:
        return row.find(module)
    except MemoryError:  # says nothing about the module, which would then be pruned without its stand-in
        raise
    except Exception:  # noqa: BLE001 - it looks at any class of any library; without a stand-in its own code runs
        return None
