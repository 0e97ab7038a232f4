"""Register a quantity of your own, which a budget can limit from then on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from keyword import iskeyword
from typing import TypeVar

from etp_graph._config import import_path, require
from etp_graph.errors import BudgetError
from etp_graph.plan import Quantity, Target, Terms, add_quantity

from ._budget import Budget, Targets

F = TypeVar("F", bound=Terms)


def register(
    terms: F, *, name: str | None = None, ratio: str | None = None, title: str = "", suffix: str = "", help: str = ""
) -> F:
    """Add a quantity that is counted from a plan, so that budgets, costs, tables and the command line know its name.

    A *term* is a coefficient times the kept sizes of (tensor, axis) pairs, as in :class:`etp_graph.Op`. The count
    is the sum of the terms. It is exact for every selection::

        def weight_bytes(plan):
            for name in plan.parameters:
                yield 4, [(name, axis) for axis in range(len(plan.tensors[name]))]

        register(weight_bytes, suffix="B")
        Budget(weight_bytes=1_000_000)

    Args:
        terms: function of a :class:`etp_graph.Plan` that returns the terms: pairs of an integer of at least 0 and of
            (tensor, axis) pairs. A tensor is a parameter or buffer, or an activation of the plan with the axis 0.
        name: name of the quantity, and keyword of the target that limits its amount; default: that of the function.
        ratio: keyword of a second target, the dense amount divided by the pruned one; default: there is none.
        title: heading of its column in tables; default: the name.
        suffix: unit of measurement, written after numbers.
        help: description in one sentence.

    Returns:
        The function.

    Raises:
        BudgetError: this is no function, the name is no identifier, or a budget has this name already.
    """
    require(callable(terms), f"{terms!r} is no quantity: pass a function of a plan that returns terms.", BudgetError)
    own = str(name or getattr(terms, "__name__", ""))
    targets = [Target(keyword=own, whole=True, help=help)]
    if ratio is not None:
        targets.append(Target(keyword=ratio, ratio=True, help=f"Dense {own} over pruned {own}."))
    for target in targets:
        _check_keyword(target.keyword)
    quantity = Quantity(name=own, terms=terms, targets=tuple(targets), title=title, suffix=suffix)
    add_quantity(quantity, path=import_path(terms))
    return terms


def register_quantity(
    name: str | None = None, *, ratio: str | None = None, title: str = "", suffix: str = "", help: str = ""
) -> Callable[[F], F]:
    """Return a decorator that registers a function as a quantity; the arguments are those of :func:`register`."""
    return lambda terms: register(terms, name=name, ratio=ratio, title=title, suffix=suffix, help=help)


def _check_keyword(keyword: str) -> None:
    sound = isinstance(keyword, str) and keyword.isidentifier() and not iskeyword(keyword)
    require(sound, f"{keyword!r} is no name for a target: pass name= or ratio= an identifier.", BudgetError)
    rules = {field.name for field in fields(Budget)} - Targets.__annotations__.keys()
    require(keyword not in rules, f"{keyword!r} is a rule of a budget; choose another name.", BudgetError)
