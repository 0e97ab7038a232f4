"""Table of the quantities that a budget can limit. Each entry says what it counts and which targets it offers.

Costs, budgets, tables, reports and the command line read this table, so that a quantity is one entry. A *term* of a
count is a coefficient times the kept sizes of (tensor, axis) pairs. A count is the sum of its terms. It is exact for
every selection, because removing units changes nothing but these sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from etp_graph._config import Registry, plain_number, require, require_number
from etp_graph._text import si
from etp_graph.errors import BudgetError

Term = tuple[int, Iterable[tuple[str, int]]]
"""Term of a count: a coefficient of at least 0, and (tensor, axis) pairs as in :class:`Op`."""

Terms = Callable[[Any], Iterable[Term]]
"""Function of a plan that returns the terms of a count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One way to limit a quantity, and the keyword for it.

    Attributes:
        keyword: name of the argument that takes the target.
        ratio: True if the dense model's amount divided by the pruned model's is at least the value. False if the
            pruned model's amount is at most the value.
        whole: True if amounts are integers. A float between 0 and 1 is then a share of the dense model's amount, and
            any other value is rounded down.
        scale: amount of the quantity that a value of 1 stands for.
        help: description in one sentence, for the command line.
        why: reason for the bounds, for the error of a value outside of them.
    """

    keyword: str
    ratio: bool = False
    whole: bool = False
    scale: int = 1
    help: str = ""
    why: str = ""

    def read(self, value: Any) -> Any:
        """Return the value as Python's number; an amount that must be a whole number is rounded down.

        Raises:
            BudgetError: it is no finite number, or is out of range.
        """
        value = plain_number(value)
        excluded = () if self.ratio or self.whole else (0,)
        require_number(self.keyword, value, int(self.ratio), error=BudgetError, excluded=excluded, why=self.why)
        return math.floor(value) if self.whole and not self.is_share(value) else value

    def is_share(self, value: Any) -> bool:
        """Return True if the value is a share of the dense model's amount: 0.7, but not 7 or 7.0."""
        return self.whole and isinstance(value, float) and 0 < value < 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """One quantity that a budget can limit.

    Attributes:
        name: its name, an identifier.
        terms: function of a plan that returns the terms of the count; ``None`` if the quantity is measured.
        targets: the ways to limit it.
        title: heading of its column in a table; default: the name.
        words: its name in sentences; default: the title.
        suffix: unit of measurement after a number, such as ``B`` for bytes.
        ratio_title: heading of the column with the dense amount over the pruned one; default: tables show the share
            that is left instead.
        stand_in: for a measured quantity, the counted one that replaces it where nothing can be measured.
        listed: whether costs and tables show it.
    """

    name: str
    terms: Terms | None
    targets: tuple[Target, ...]
    title: str = ""
    words: str = ""
    suffix: str = ""
    ratio_title: str = ""
    stand_in: str = ""
    listed: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or self.name)
        object.__setattr__(self, "words", self.words or self.title)

    @property
    def measured(self) -> bool:
        """True if it is measured on a machine, and not counted from a plan."""
        return self.terms is None

    @property
    def amount_target(self) -> Target:
        """The target that limits the amount itself."""
        return next(target for target in self.targets if not target.ratio)

    @property
    def counted_name(self) -> str:
        """Return the name of the quantity that is counted for this one, itself or what stands in for a measured one."""
        return self.stand_in if self.measured else self.name

    def list_terms(self, plan: Any) -> list[tuple[int, tuple[tuple[str, int], ...]]]:
        """Return the terms of the count for a plan.

        Raises:
            BudgetError: the quantity is measured, or its function returned something else than terms.
        """
        if self.terms is None:
            raise BudgetError(f"{self.name} is measured, not counted: allocate(..., example_inputs=...) does that.")
        try:
            found = [(coefficient, tuple(axes)) for coefficient, axes in self.terms(plan)]
        except (TypeError, ValueError) as error:
            raise BudgetError(self._wrong_terms(repr(error))) from error
        for coefficient, axes in found:
            whole = isinstance(coefficient, int) and coefficient >= 0
            require(whole, self._wrong_terms(f"the coefficient {coefficient!r}"), BudgetError)
            require(all(map(_is_axis, axes)), self._wrong_terms(f"the axes {axes!r}"), BudgetError)
        return found

    def _wrong_terms(self, found: str) -> str:
        return (
            f"quantity {self.name!r}: found {found} in its terms; expected pairs of an integer of at least 0 and of "
            "((tensor, axis), ...). Correct the function that was registered."
        )

    def write(self, amount: int) -> str:
        """Return an amount as short text, such as ``4.089 G``."""
        return si(amount, self.suffix)


def _is_axis(pair: object) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], int)


QUANTITIES: Registry[Quantity] = Registry(
    "quantity", error=BudgetError, remedy="Import the module that registers it (--import on the command line)."
)
"""Every registered quantity, by name."""


def add_quantity(quantity: Quantity, *, path: str = "") -> Quantity:
    """Add a quantity to :data:`QUANTITIES`, and return it; ``path`` is the import path of its definition.

    Raises:
        BudgetError: another quantity has its name or the keyword of one of its targets.
    """
    known = known_targets()
    for keyword in (target.keyword for target in quantity.targets):
        owner = known[keyword][0].name if keyword in known else quantity.name
        require(
            owner == quantity.name,
            f"quantity {quantity.name!r}: the target {keyword!r} belongs to {owner!r}; choose another name.",
            BudgetError,
        )
    return QUANTITIES.register(quantity.name, quantity, path=path)


def described_quantity(name: str) -> Quantity:
    """Return the quantity of this name; one without a description if a cost of another process counted it."""
    return QUANTITIES.get(name) or Quantity(name=name, terms=None, targets=())


def counted_quantities() -> tuple[Quantity, ...]:
    """Return the registered quantities that costs count and tables show, in the order of their registration."""
    return tuple(quantity for quantity in QUANTITIES.values() if not quantity.measured and quantity.listed)


def known_targets() -> dict[str, tuple[Quantity, Target]]:
    """Return the registered targets with their quantities, by keyword."""
    return {target.keyword: (quantity, target) for quantity in QUANTITIES.values() for target in quantity.targets}


def find_target(keyword: object) -> tuple[Quantity, Target]:
    """Return the quantity and the target with this keyword.

    Raises:
        BudgetError: there is none; the message lists the known ones.
    """
    known = known_targets()
    if isinstance(keyword, str) and keyword in known:
        return known[keyword]
    raise BudgetError(f"there is no target {keyword!r}; known are {', '.join(known)}. {QUANTITIES.remedy}")


MEMORY = "memory"
"""Name of the quantity of the bytes of weights, and how :func:`memory_quantity` names begin."""


def memory_quantity(kv_tokens: int) -> str:
    """Return the name of the quantity of the bytes of weights and of so many tokens in the cache."""
    return f"{MEMORY}+{kv_tokens}" if kv_tokens else MEMORY


def find_quantity(name: str) -> Quantity:
    """Return the quantity of this name, registered or of :func:`memory_quantity`.

    Raises:
        BudgetError: there is none.
    """
    base, _, tokens = name.partition("+")
    found = QUANTITIES.find(base)
    if not tokens:
        return found
    return replace(found, name=name, terms=lambda plan: _memory_terms(plan, int(tokens)))


def _memory_terms(plan: Any, kv_tokens: int = 0) -> Iterator[Term]:
    """Yield the bytes of each parameter, and those of so many cached tokens."""
    require(
        not kv_tokens or bool(plan.cache),
        f"kv_tokens={kv_tokens}, and the traced model returned no cache of keys and values: trace with use_cache=True, "
        "or leave kv_tokens out.",
        BudgetError,
    )
    for name in plan.parameters:
        yield plan.itemsizes.get(name, 4), whole_axes(plan, name)
    for op in plan.cache:
        yield kv_tokens * op.coefficient, op.axes


def whole_axes(plan: Any, name: str) -> tuple[tuple[str, int], ...]:
    """Return the (tensor, axis) pairs of all axes of a tensor, whose sizes multiply to its number of elements."""
    return tuple((name, axis) for axis in range(len(plan.tensors[name])))


for _quantity in (
    Quantity(
        name="macs", title="MACs", ratio_title="speed-up",
        terms=lambda plan: ((op.coefficient, op.axes) for op in plan.ops),
        targets=(
            Target(keyword="speed_up", ratio=True, help="Dense MACs over pruned MACs.",
                   why="since a speed_up of 2 halves the MACs"),
            Target(keyword="macs", whole=True, help="At most this many multiply-adds; 0.7: this share of them."),
        ),
    ),
    Quantity(
        name="params", words="parameters", terms=lambda plan: ((1, whole_axes(plan, name)) for name in plan.parameters),
        targets=(Target(keyword="params", whole=True, help="At most this many parameters; 0.7: this share of them."),),
    ),
    Quantity(
        name=MEMORY, title="memory", words="bytes of weights", suffix="B", terms=_memory_terms, listed=False,
        targets=(
            Target(keyword="memory_mb", scale=10**6, why="since every model has weights",
                   help="At most this many megabytes of weights, and of the cache with --kv-tokens."),
        ),
    ),
    Quantity(
        name="latency", suffix="ms", terms=None, stand_in="macs",
        targets=(
            Target(keyword="latency_ms", help="Measured milliseconds.", why="since every model takes time"),
            Target(keyword="speed_up_latency", ratio=True, help="Dense time over pruned time, measured."),
        ),
    ),
):  # fmt: skip
    add_quantity(_quantity)
