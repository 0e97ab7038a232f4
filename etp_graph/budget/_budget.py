"""Budget of a pruned model: one target, and the rules for reaching it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from functools import wraps
from inspect import Parameter, signature
from math import ceil, floor
from typing import Any, Literal, TypedDict, TypeVar, get_args

from etp_graph._config import plain_number, read_mapping, require, require_choice, require_count, require_number
from etp_graph._json import shorten
from etp_graph.errors import BudgetError
from etp_graph.plan import (
    KINDS,
    QUANTITIES,
    Cost,
    Quantity,
    Target,
    find_quantity,
    find_target,
    known_targets,
    memory_quantity,
)

from ._uniform import Uniform, read_uniform

Scope = Literal["global", "local", "isomorphic", "balanced"]

Rank = Literal["score", "score_per_sqrt_cost", "score_per_mac"]

F = TypeVar("F", bound=Callable[..., Any])

T = TypeVar("T", bound=type[Any])


class Targets(TypedDict, total=False):
    """Keyword arguments of a function that takes a target: ``**targets: Unpack[Targets]``.

    Type checkers and editors then know the built-in ones. At run time :meth:`etp_graph.Budget.of` accepts every
    registered one.
    """

    speed_up: float | None
    macs: int | float | None
    params: int | float | None
    latency_ms: float | None
    speed_up_latency: float | None
    memory_mb: float | None


def accept_registered(cls: T) -> T:
    """Let the constructor of a budget accept the target of every registered quantity as a keyword.

    ``Budget(weight_bytes=1000)`` is then ``Budget(registered_target=("weight_bytes", 1000))``.
    """
    build, known = cls.__init__, {one.name for one in fields(cls)}

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
    """Budget of a pruned model: exactly one target (one of the first seven attributes), and the rules for reaching it.

    The target of a registered quantity is a keyword argument too: ``Budget(weight_bytes=1_000_000)``, see
    :func:`etp_graph.budget.register`.

    Attributes:
        speed_up: dense MACs divided by the pruned model's MACs is at least this.
        macs: at most this many multiply-adds for the example inputs. A float between 0 and 1 is the share of the dense
            model's.
        params: at most this many parameters, or this share of them.
        latency_ms: a forward of the example inputs takes this many milliseconds (median, measured on this machine).
        speed_up_latency: median time of the dense model divided by that of the pruned one is this.
        memory_mb: the parameters, and with ``kv_tokens`` the cache, take at most this many megabytes (10^6 bytes) in
            the precision of the traced model.
        registered_target: keyword and value of a target that is none of these.
        min_units: every group keeps at least this many units (Torque's minimum-filter rule). A dict gives the number
            by kind of units: ``{"heads": 2}``; other groups then keep at least 1.
        max_ratio: at most this share of the units of a group is removed.
        round_to: the width that a group keeps is a multiple of this, unless it keeps all units. A channel or neuron
            is 1 wide, a head as wide as its keys, a group of a convolution as its channels; experts are not rounded.
            A dict gives the multiple of units by kind, ``{"neurons": 64, "heads": 2}``; other kinds are not rounded.
            ``None``: 1; for a latency target, in groups that are large enough, the multiple at which measured layer
            times step.
        scope: ``global`` compares scores across groups; ``local`` removes the same share of every group;
            ``isomorphic`` compares ranks within classes of equally built groups (Fang et al. 2024); ``balanced``
            compares the mean of a unit's rank in its group and its rank among all units. ``None``: the
            scope of the method, or ``global`` if there is no method.
        rank: value that is compared across groups. ``score``: the score. ``score_per_mac``: the score divided by the
            MACs that removing the unit alone saves. ``score_per_sqrt_cost``: the score divided by the square root of
            what the unit alone saves of the quantity that the target limits; for a latency target, of the saved MACs.
            ``None``: the rank of the method, or ``score`` if there is no method.
        kv_tokens: with ``memory_mb``, number of tokens, of all samples together, whose keys and values the cache holds.
        decode: a latency target is the time of one more token after the example inputs of a language model, with their
            keys and values in a cache, in place of the time of their forward.
        tolerance: accepted relative deviation of a measured latency from its target; not used for other targets.
        uniform: groups of one kind with equally many units keep equally many, each the best of its own. A configuration
            with one value for all layers (``intermediate_size``) then describes the pruned model. ``True`` for all
            kinds, or a kind, or a list of kinds.

    Raises:
        BudgetError: a value is out of its range, not exactly one target is given, or a target is not registered.
    """

    speed_up: float | None = None
    macs: int | float | None = None
    params: int | float | None = None
    latency_ms: float | None = None
    speed_up_latency: float | None = None
    memory_mb: float | None = None
    registered_target: tuple[str, float] | None = None
    min_units: int | Mapping[str, int] = field(default=1, hash=False)
    max_ratio: float = 1.0
    round_to: int | Mapping[str, int] | None = field(default=None, hash=False)
    scope: Scope | None = None
    rank: Rank | None = None
    tolerance: float = 0.1
    uniform: Uniform = False
    kv_tokens: int = 0
    decode: bool = False

    def __post_init__(self) -> None:
        for rule in fields(self):
            object.__setattr__(self, rule.name, _plain(getattr(self, rule.name)))
        _require_one([name for name in _NO_TARGET if getattr(self, name) is not None])
        self._set_target()
        if self.round_to is None and not self.measured:
            object.__setattr__(self, "round_to", 1)
        self._check_rules()

    def _set_target(self) -> None:
        """Check the value of the target, and round it down if it is an amount that must be a whole number."""
        keyword, value = self._given
        value = find_target(keyword)[1].read(value)
        own = keyword in Targets.__annotations__
        object.__setattr__(self, keyword if own else "registered_target", value if own else (keyword, value))

    def _check_rules(self) -> None:
        object.__setattr__(self, "uniform", read_uniform(self.uniform))
        _require_counts("min_units", self.min_units)
        require_count("kv_tokens", self.kv_tokens, 0, BudgetError)
        require(
            not self.kv_tokens or self.memory_mb is not None,
            f"kv_tokens={self.kv_tokens} belongs to memory_mb=, found {self.as_given}: leave one of them out.",
            BudgetError,
        )
        require(type(self.decode) is bool, f"decode={self.decode!r}: give True or False.", BudgetError)
        require(
            not self.decode or self.measured,
            f"decode=True belongs to latency_ms= or speed_up_latency=, found {self.as_given}: leave one of them out.",
            BudgetError,
        )
        require_number("max_ratio", self.max_ratio, 0, 1, BudgetError)
        require_number("tolerance", self.tolerance, 0, 1, BudgetError)
        if self.round_to is not None:
            _require_counts("round_to", self.round_to)
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
        rules = {one.name for one in fields(cls)} - _NO_TARGET.keys()
        for name in targets:
            require(name not in rules, f"{name}= is a rule: pass budget=etp.Budget(..., {name}=...).", BudgetError)
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
        return memory_quantity(self.kv_tokens) if self.memory_mb is not None else self._entry[0].name

    @property
    def measured(self) -> bool:
        """True if the target is measured on a machine, and not counted from a plan."""
        return self._entry[0].measured

    @property
    def counted(self) -> str:
        """Return the name of the counted quantity, which is ``quantity`` or what stands in for a measured one."""
        return self._entry[0].counted_name if self.measured else self.quantity

    def target(self, dense: Cost) -> int:
        """Return the largest allowed amount of the quantity, given the dense cost.

        No cost counts memory; :meth:`largest_amount` takes what ``plan.memory_bytes`` returns.

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
        if target.is_share(value):
            return int(dense * Fraction(repr(value)))  # 0.7 is seven tenths, not the float below it
        if target.scale != 1:
            return int(Fraction(repr(value)) * target.scale)
        return int(dense / Fraction(value)) if target.ratio else int(value)  # exact, never above the target

    def _require_counted(self) -> None:
        require(
            not self.measured,
            f"{self.as_given} is measured, not counted: allocate(..., example_inputs=...) does that.",
            BudgetError,
        )

    def with_count(self, goal: int) -> Budget:
        """Return the same rules with the target ``goal``, an amount of the quantity that is counted."""
        target = find_quantity(self.counted).amount_target
        value = goal if target.scale == 1 else goal / target.scale
        return replace(self, decode=False, **{**_NO_TARGET, target.keyword: value})  # type: ignore[arg-type]

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

    def reachable(self, dense: Cost | int, value: int) -> str:
        """Return an amount as text in the form of the target, rounded so that it can be reached.

        Args:
            dense: the dense cost, or the dense amount of the quantity.
            value: the amount.
        """
        target = self._entry[1]
        whole = dense if isinstance(dense, int) else dense.amount(self.quantity)
        if target.is_share(self._given[1]) and 0 < value < whole:
            least = ceil(Fraction(value, whole) * 10_000) / 10_000
            return f"{target.keyword}={least if least < 1 else value}"
        if target.scale != 1:
            return f"{target.keyword}={ceil(Fraction(1000 * value, target.scale)) / 1000}"
        share = Fraction(whole, max(value, 1))
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
        for name, unset in (
            ("memory_mb", None),
            ("kv_tokens", 0),
            ("uniform", False),
            ("decode", False),
        ):  # version 0.1.0 does not know them
            if body[name] == unset:
                del body[name]
        registered = body.pop("registered_target")
        return body if registered is None else {**body, registered[0]: registered[1]}

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> Budget:
        """Read what :meth:`to_json` or :meth:`to_dict` wrote. Raises :class:`BudgetError` if it is not a budget."""
        try:
            return cls(**read_mapping(text, "this text is not a budget", BudgetError))
        except (TypeError, ValueError) as error:
            cause = shorten(str(error), quote=False)
            raise BudgetError(f"this text is not a budget: {cause}") from error


_DEPENDENT = "kv_tokens (beside memory_mb), decode (beside latency_ms and speed_up_latency)"

_NO_TARGET: Mapping[str, None] = dict.fromkeys([*Targets.__annotations__, "registered_target"])
"""The fields of a budget for its target, all ``None``."""


def show_targets(function: F) -> F:
    """Show the built-in targets in the signature of a function with ``**targets``, for ``help()`` and the reference."""
    found = signature(function)
    own = [p for p in found.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    others = [p for p in found.parameters.values() if p.kind is Parameter.VAR_KEYWORD]
    shown = [
        Parameter(target.name, Parameter.KEYWORD_ONLY, default=None, annotation=target.type)
        for target in fields(Budget) if target.name in Targets.__annotations__
    ]  # fmt: skip
    function.__signature__ = found.replace(parameters=[*own, *shown, *others])  # type: ignore[attr-defined]
    return function


def _plain(value: Any) -> Any:
    """Return a setting with Python's numbers in place of scalars of NumPy and PyTorch."""
    if isinstance(value, Mapping):
        return {key: plain_number(number) for key, number in value.items()}
    return plain_number(value)


def _require_counts(name: str, value: object) -> None:
    """Raise :class:`BudgetError` unless the rule is a count of at least 1, or such counts by kind of units."""
    if not isinstance(value, Mapping):
        require_count(name, value, 1, BudgetError)
        return
    for kind, count in value.items():
        require_choice(f"a kind of {name}", kind, KINDS, BudgetError)
        require_count(f"{name}[{kind!r}]", count, 1, BudgetError)


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
    rules = ", ".join([*sorted(known - {*_NO_TARGET, "kv_tokens", "decode"}), _DEPENDENT])
    require(
        name in targets,
        f"a budget has no {shorten(name)}; targets are {', '.join(targets)}, rules are {rules}. {QUANTITIES.remedy}",
        BudgetError,
    )
