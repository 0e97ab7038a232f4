"""Budget of a pruned model: one target, and the rules for reaching it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, Literal, get_args

from etp_graph.errors import BudgetError
from etp_graph.plan import Cost

Scope = Literal["global", "local", "isomorphic"]

Rank = Literal["score", "score_per_sqrt_cost", "score_per_mac"]

Quantity = Literal["macs", "params", "latency"]

TARGETS = ("speed_up", "macs", "params", "latency_ms", "speed_up_latency")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Budget of a pruned model: exactly one target (one of the first five attributes), and the rules for reaching it.

    Attributes:
        speed_up: dense MACs divided by the pruned model's MACs is at least this.
        macs: at most this many multiply-adds for the example inputs.
        params: at most this many parameters.
        latency_ms: a forward of the example inputs takes this many milliseconds (median, measured on this machine).
        speed_up_latency: median time of the dense model divided by that of the pruned one is this.
        min_units: every group keeps at least this many units (Torque's minimum-filter rule).
        max_ratio: at most this share of the units of a group is removed.
        round_to: the number of kept units is a multiple of this, unless the group keeps all units. ``None``: 1; for a
            latency target, in groups that are large enough, the multiple at which measured layer times step.
        scope: ``global`` compares scores across groups; ``local`` removes the same share of every group;
            ``isomorphic`` compares ranks within classes of equally built groups (Fang et al. 2024). ``None``: the
            scope of the method, or ``global`` if there is no method.
        rank: value that is compared across groups. ``score``: the score. ``score_per_mac``: the score divided by the
            MACs that removing the unit alone saves. ``score_per_sqrt_cost``: the score divided by the square root of
            the saved parameters if the target is ``params``, else of the saved MACs. ``None``: the rank of the method,
            or ``score`` if there is no method.
        tolerance: accepted relative deviation of a measured latency from its target; not used for other targets.

    Raises:
        BudgetError: a value is out of its range, or not exactly one target is given.
    """

    speed_up: float | None = None
    macs: int | None = None
    params: int | None = None
    latency_ms: float | None = None
    speed_up_latency: float | None = None
    min_units: int = 1
    max_ratio: float = 1.0
    round_to: int | None = None
    scope: Scope | None = None
    rank: Rank | None = None
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise BudgetError(
                f"a budget has one target, found {' and '.join(given) or 'none'}: "
                "give exactly one of speed_up=, macs=, params=, latency_ms= and speed_up_latency=."
            )
        (name,) = given
        _check_number(name, getattr(self, name), 1 if name.startswith("speed_up") else 0, math.inf)
        if self.latency_ms == 0:
            raise BudgetError("latency_ms=0: every model takes time; give milliseconds above 0.")
        if name in ("macs", "params"):
            object.__setattr__(self, name, math.floor(getattr(self, name)))
        _check_number("max_ratio", self.max_ratio, 0, 1)
        _check_number("tolerance", self.tolerance, 0, 1)
        if self.round_to is None and self.quantity != "latency":
            object.__setattr__(self, "round_to", 1)
        self._check_rules()

    def _check_rules(self) -> None:
        for name in ("min_units", "round_to"):
            value = getattr(self, name)
            if (type(value) is not int or value < 1) and not (name == "round_to" and value is None):
                raise BudgetError(f"{name}={value!r}: give an integer of at least 1.")
        if self.scope is not None:
            check_choice("scope", self.scope, get_args(Scope))
        if self.rank is not None:
            check_choice("rank", self.rank, get_args(Rank))

    @property
    def quantity(self) -> Quantity:
        """Return the quantity that the target limits."""
        if self.latency_ms is not None or self.speed_up_latency is not None:
            return "latency"
        return "macs" if self.params is None else "params"

    def target(self, dense: Cost) -> int:
        """Return the largest allowed number of MACs or parameters, given the dense cost.

        Raises:
            BudgetError: the target is in MACs and the plan counts none, or the target is a latency, which is measured.
        """
        if self.quantity == "latency":
            raise BudgetError(f"{self.as_given} is measured, not counted: allocate(..., example_inputs=...) does that.")
        if self.quantity == "macs" and not dense.macs:
            raise BudgetError("the plan counts no MACs, so none can be saved: give params=.")
        if self.speed_up is not None:
            return int(dense.macs / Fraction(self.speed_up))  # exact, so that rounding never exceeds the target
        return int(getattr(self, self.quantity))

    def with_count(self, goal: int) -> Budget:
        """Return the same rules with the target ``goal``, in parameters if this target is, else in MACs."""
        macs, params = (None, goal) if self.quantity == "params" else (goal, None)
        nothing = dict.fromkeys(TARGETS)
        return replace(self, **{**nothing, "macs": macs, "params": params})  # type: ignore[arg-type]

    def share_of_time(self, dense_seconds: float) -> float:
        """Return a latency target as a share of the dense model's median time in seconds."""
        if self.speed_up_latency is not None:
            return 1 / self.speed_up_latency
        assert self.latency_ms is not None
        return self.latency_ms / 1e3 / dense_seconds

    @property
    def as_given(self) -> str:
        """Return the target as text, such as ``macs=1000000``."""
        name = next(name for name in TARGETS if getattr(self, name) is not None)
        return f"{name}={getattr(self, name)}"

    def reachable(self, dense: Cost, value: int) -> str:
        """Return ``value`` MACs or parameters as text in the form of the target, rounded so that it can be reached."""
        if self.speed_up is not None:
            return f"speed_up={math.floor(Fraction(dense.macs, max(value, 1)) * 10_000) / 10_000}"
        return f"{self.quantity}={value}"

    def reachable_time(self, seconds: float, dense_seconds: float) -> str:
        """Return measured seconds as text in the form of a latency target, rounded so that it can be reached."""
        if self.speed_up_latency is not None:
            return f"speed_up_latency={max(1.0, math.floor(dense_seconds / seconds * 100) / 100)}"
        return f"latency_ms={math.ceil(seconds * 1e6) / 1e3}"

    def to_json(self) -> str:
        """Return the budget as JSON text; :meth:`from_json` reads it back."""
        return json.dumps(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as a dict that JSON can store."""
        return asdict(self)

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> Budget:
        """Read what :meth:`to_json` or :meth:`to_dict` wrote. Raises :class:`BudgetError` if it is not a budget."""
        try:
            return cls(**(json.loads(text) if isinstance(text, str) else text))
        except (TypeError, ValueError) as error:
            raise BudgetError(f"this text is not a budget: {error}") from error


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise :class:`BudgetError` unless the value is one of those allowed."""
    if value not in allowed:
        raise BudgetError(f"{name}={value!r}: give one of {', '.join(map(repr, allowed))}.")


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    """Raise :class:`BudgetError` unless ``value`` is a finite real number in [least, most]."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if (whole or (isinstance(value, float) and math.isfinite(value))) and least <= value <= most:
        return
    end = "" if math.isinf(most) else f" and at most {most:g}"
    hint = "; a speed_up of 2 halves the MACs" if name == "speed_up" else ""
    raise BudgetError(f"{name}={value!r}: give a finite number of at least {least:g}{end}{hint}.")
