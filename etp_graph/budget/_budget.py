"""Budget of a pruned model: one target, and the rules for reaching it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from functools import wraps
from inspect import Parameter, signature
from math import ceil, floor
from typing import Any, Literal, TypedDict, TypeVar, get_args

from etp_graph._config import require, require_choice, require_count, require_number
from etp_graph.errors import BudgetError
from etp_graph.plan import QUANTITIES, Cost, Quantity, Target, find_target, known_targets

from ._uniform import Uniform, read_uniform

Scope = Literal["global", "local", "isomorphic"]

Rank = Literal["score", "score_per_sqrt_cost", "score_per_mac"]

F = TypeVar("F", bound=Callable[..., Any])

T = TypeVar("T", bound=type[Any])


class Targets(TypedDict, total=False):
    """Keyword arguments of a function that takes a target: ``**targets: Unpack[Targets]``.

    Type checkers and editors then know the built-in ones. At run time :meth:`etp_graph.Budget.of` accepts every
    registered one.
    """

    speed_up: float | None
    macs: int | None
    params: int | None
    latency_ms: float | None
    speed_up_latency: float | None


def accept_registered(cls: T) -> T:
    """Let the constructor of a budget accept the target of every registered quantity as a keyword.

    ``Budget(weight_bytes=1000)`` is then ``Budget(registered_target=("weight_bytes", 1000))``.
    """
    build, known = cls.__init__, {field.name for field in fields(cls)}

    @wraps(build)
    def __init__(self: Any, **values: Any) -> None:
        others = {name: value for name, value in values.items() if name not in known}
        for name in others:
            _require_known(name, known)
        given = [(name, value) for name, value in others.items() if value is not None]
        own = {name: value for name, value in values.items() if name in known}
        if given:
            built_in = [name for name in values if name in _NO_TARGET and values[name] is not None]
            _require_one([*built_in, *(name for name, _ in given)])
            own["registered_target"] = given[0]
        build(self, **own)

    cls.__init__ = __init__
    return cls


@accept_registered
@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Budget of a pruned model: exactly one target (one of the first six attributes), and the rules for reaching it.

    The target of a registered quantity is a keyword argument too: ``Budget(weight_bytes=1_000_000)``, see
    :func:`etp_graph.budget.register`.

    Attributes:
        speed_up: dense MACs divided by the pruned model's MACs is at least this.
        macs: at most this many multiply-adds for the example inputs.
        params: at most this many parameters.
        latency_ms: a forward of the example inputs takes this many milliseconds (median, measured on this machine).
        speed_up_latency: median time of the dense model divided by that of the pruned one is this.
        registered_target: keyword and value of a target that is none of these.
        min_units: every group keeps at least this many units (Torque's minimum-filter rule).
        max_ratio: at most this share of the units of a group is removed.
        round_to: the number of kept units is a multiple of this, unless the group keeps all units. ``None``: 1; for a
            latency target, in groups that are large enough, the multiple at which measured layer times step.
        scope: ``global`` compares scores across groups; ``local`` removes the same share of every group;
            ``isomorphic`` compares ranks within classes of equally built groups (Fang et al. 2024). ``None``: the
            scope of the method, or ``global`` if there is no method.
        rank: value that is compared across groups. ``score``: the score. ``score_per_mac``: the score divided by the
            MACs that removing the unit alone saves. ``score_per_sqrt_cost``: the score divided by the square root of
            what the unit alone saves of the quantity that the target limits; for a latency target, of the saved MACs.
            ``None``: the rank of the method, or ``score`` if there is no method.
        tolerance: accepted relative deviation of a measured latency from its target; not used for other targets.
        uniform: groups of one kind with equally many units keep equally many, each the best of its own. A configuration
            with one value for all layers (``intermediate_size``) then describes the pruned model. ``True`` for all
            kinds, or a kind, or a list of kinds.

    Raises:
        BudgetError: a value is out of its range, not exactly one target is given, or a target is not registered.
    """

    speed_up: float | None = None
    macs: int | None = None
    params: int | None = None
    latency_ms: float | None = None
    speed_up_latency: float | None = None
    registered_target: tuple[str, float] | None = None
    min_units: int = 1
    max_ratio: float = 1.0
    round_to: int | None = None
    scope: Scope | None = None
    rank: Rank | None = None
    tolerance: float = 0.1
    uniform: Uniform = False

    def __post_init__(self) -> None:
        _require_one([name for name in _NO_TARGET if getattr(self, name) is not None])
        self._set_target()
        if self.round_to is None and not self.measured:
            object.__setattr__(self, "round_to", 1)
        self._check_rules()

    def _set_target(self) -> None:
        """Check the value of the target, and round it down if it is a whole number."""
        keyword, value = self._given
        value = find_target(keyword)[1].read(value)
        own = keyword in Targets.__annotations__
        object.__setattr__(self, keyword if own else "registered_target", value if own else (keyword, value))

    def _check_rules(self) -> None:
        object.__setattr__(self, "uniform", read_uniform(self.uniform))
        require_count("min_units", self.min_units, 1, BudgetError)
        require_number("max_ratio", self.max_ratio, 0, 1, BudgetError)
        require_number("tolerance", self.tolerance, 0, 1, BudgetError)
        if self.round_to is not None:
            require_count("round_to", self.round_to, 1, BudgetError)
        if self.scope is not None:
            require_choice("scope", self.scope, get_args(Scope), BudgetError)
        if self.rank is not None:
            require_choice("rank", self.rank, get_args(Rank), BudgetError)

    @classmethod
    def of(cls, budget: Budget | None, targets: Mapping[str, object]) -> Budget:
        """Return the budget that a function got as ``budget=`` or as the keyword of a target.

        Args:
            budget: the budget, or ``None``.
            targets: keywords of targets with their values, see :class:`etp_graph.budget.Targets`.

        Raises:
            BudgetError: a keyword is not registered, or not exactly one of all these is given.
        """
        for name in targets:
            find_target(name)
        given = {name: value for name, value in targets.items() if value is not None}
        if budget is None:
            return cls(**given)  # type: ignore[arg-type]  # checked by the constructor
        names = " and ".join(f"{name}=" for name in given)
        require(not given, f"found budget= and {names}: give one of them.", BudgetError)
        return budget

    @property
    def _given(self) -> tuple[str, Any]:
        """Keyword and value of the target."""
        name = next(name for name in _NO_TARGET if getattr(self, name) is not None)
        found: tuple[str, Any] = getattr(self, name) if name == "registered_target" else (name, getattr(self, name))
        return found

    @property
    def _entry(self) -> tuple[Quantity, Target]:
        return find_target(self._given[0])

    @property
    def quantity(self) -> str:
        """Return the name of the quantity that the target limits, see :data:`etp_graph.budget.QUANTITIES`."""
        return self._entry[0].name

    @property
    def measured(self) -> bool:
        """True if the target is measured on a machine, and not counted from a plan."""
        return self._entry[0].measured

    @property
    def counted(self) -> str:
        """Return the name of the counted quantity, which is ``quantity`` or what stands in for a measured one."""
        return self._entry[0].counted_name

    def target(self, dense: Cost) -> int:
        """Return the largest allowed amount of the quantity, given the dense cost.

        Raises:
            BudgetError: the plan counts nothing of the quantity, or the target is measured.
        """
        self._require_counted()
        return self.largest_amount(dense.amount(self.quantity))

    def largest_amount(self, dense: int) -> int:
        """Return the largest allowed amount of the quantity, given the dense amount. Raises like :meth:`target`."""
        self._require_counted()
        (quantity, target), value = self._entry, self._given[1]
        require(
            dense > 0,
            f"the plan counts no {quantity.words}, so none can be saved: give the target of another quantity, such as "
            "params=.",
            BudgetError,
        )
        return int(dense / Fraction(value)) if target.ratio else int(value)  # exact, never above the target

    def _require_counted(self) -> None:
        require(
            not self.measured,
            f"{self.as_given} is measured, not counted: allocate(..., example_inputs=...) does that.",
            BudgetError,
        )

    def with_count(self, goal: int) -> Budget:
        """Return the same rules with the target ``goal``, an amount of the quantity that is counted."""
        keyword = QUANTITIES[self.counted].amount_target.keyword
        return replace(self, **{**_NO_TARGET, keyword: goal})  # type: ignore[arg-type]

    def with_cost(self, cost: Cost) -> Budget:
        """Return the same rules with what ``cost`` counts as the target, as :meth:`with_count` does."""
        return self.with_count(cost.amount(self.counted))

    def share_of_time(self, dense_seconds: float) -> float:
        """Return a latency target as a share of the dense model's median time in seconds."""
        value = float(self._given[1])
        return 1 / value if self._entry[1].ratio else value / 1e3 / dense_seconds

    @property
    def as_given(self) -> str:
        """Return the target as text, such as ``macs=1000000``."""
        return "{}={}".format(*self._given)

    def reachable(self, dense: Cost, value: int) -> str:
        """Return an amount as text in the form of the target, rounded so that it can be reached."""
        quantity, target = self._entry
        share = Fraction(dense.amount(quantity.name), max(value, 1))
        return f"{target.keyword}={floor(share * 10_000) / 10_000 if target.ratio else value}"

    def reachable_time(self, seconds: float, dense_seconds: float) -> str:
        """Return measured seconds as text in the form of a latency target, rounded so that it can be reached."""
        target = self._entry[1]
        ratio = max(1.0, floor(dense_seconds / seconds * 100) / 100)
        return f"{target.keyword}={ratio if target.ratio else ceil(seconds * 1e6) / 1e3}"

    def to_json(self) -> str:
        """Return the budget as JSON text; :meth:`from_json` reads it back."""
        return json.dumps(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as a dict that JSON can store; a registered target is stored under its keyword."""
        body = asdict(self)
        registered = body.pop("registered_target")
        return body if registered is None else {**body, registered[0]: registered[1]}

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> Budget:
        """Read what :meth:`to_json` or :meth:`to_dict` wrote. Raises :class:`BudgetError` if it is not a budget."""
        try:
            return cls(**(json.loads(text) if isinstance(text, str) else text))
        except (TypeError, ValueError) as error:
            raise BudgetError(f"this text is not a budget: {error}") from error


_NO_TARGET: Mapping[str, None] = dict.fromkeys([*Targets.__annotations__, "registered_target"])
"""The fields of a budget for its target, all ``None``."""


def show_targets(function: F) -> F:
    """Show the built-in targets in the signature of a function with ``**targets``, for ``help()`` and the reference."""
    found = signature(function)
    own = [p for p in found.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    others = [p for p in found.parameters.values() if p.kind is Parameter.VAR_KEYWORD]
    shown = [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=None, annotation=field.type)
        for field in fields(Budget) if field.name in Targets.__annotations__
    ]  # fmt: skip
    function.__signature__ = found.replace(parameters=[*own, *shown, *others])  # type: ignore[attr-defined]
    return function


def _require_one(given: list[str]) -> None:
    *most, last = (f"{keyword}=" for keyword in known_targets())
    require(
        len(given) == 1,
        f"a budget has one target, found {' and '.join(given) or 'none'}: give exactly one of {', '.join(most)} and "
        f"{last}.",
        BudgetError,
    )


def _require_known(name: str, known: set[str]) -> None:
    targets = known_targets()
    rules = ", ".join(sorted(known - _NO_TARGET.keys()))
    require(
        name in targets,
        f"a budget has no {name!r}; targets are {', '.join(targets)}, rules are {rules}. {QUANTITIES.remedy}",
        BudgetError,
    )
