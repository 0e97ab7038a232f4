"""Cost of one forward: multiply-adds, parameters, and the other registered quantities."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from etp_graph._json import JsonReader, shorten
from etp_graph.errors import PlanError

_READ = JsonReader(PlanError)

_LARGEST = 2**1000
"""Largest amount that is read. Ratios of such amounts are finite floats; those of a real model are much smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one forward with the example inputs costs.

    Attributes:
        macs: multiply-adds.
        params: numbers in the parameters (buffers are not parameters).
        uncounted: operators that ran and are not in ``macs``.
        others: amounts of the other quantities, by name; see :func:`etp_graph.budget.register`.
    """

    macs: int
    params: int
    uncounted: tuple[str, ...] = ()
    others: Mapping[str, int] = field(default_factory=dict, hash=False, repr=False)

    @classmethod
    def of(cls, amounts: Mapping[str, int], uncounted: tuple[str, ...]) -> Cost:
        """Return the cost with these amounts, by name of the quantity; ``macs`` and ``params`` are among them."""
        others = {name: amount for name, amount in amounts.items() if name not in ("macs", "params")}
        return cls(macs=amounts["macs"], params=amounts["params"], uncounted=uncounted, others=others)

    @property
    def amounts(self) -> dict[str, int]:
        """Amounts of all quantities, by name."""
        return {"macs": self.macs, "params": self.params, **self.others}

    def amount(self, quantity: str) -> int:
        """Return the amount of the quantity of this name.

        Raises:
            PlanError: this cost does not count it.
        """
        if quantity not in self.amounts:
            raise PlanError(
                f"this cost counts {', '.join(self.amounts)}, not {quantity!r}: count it with etp_graph.cost after "
                "the quantity was registered."
            )
        return self.amounts[quantity]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON can store; ``others`` only if there are any."""
        return {name: value for name, value in asdict(self).items() if name != "others" or value}

    def to_json(self) -> str:
        """Return the cost as JSON text; :meth:`from_json` reads it back."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, source: str | Mapping[str, Any]) -> Cost:
        """Return the cost that :meth:`to_json` or :meth:`to_dict` wrote.

        Raises:
            PlanError: this is no cost.
        """
        where = "this text is not a cost"
        found = _READ.parse(source, where, fractions=False) if not isinstance(source, Mapping) else dict(source)
        body = _READ.require_object(found, where, ("macs", "params", "uncounted"), optional=("others",))
        counted = {
            "macs": body["macs"],
            "params": body["params"],
            **_READ.require_object(body.get("others", {}), where),
        }
        amounts = {
            name: _READ.require_integer(n, f"{where}: {shorten(name)}", high=_LARGEST) for name, n in counted.items()
        }
        names = list(body["uncounted"]) if isinstance(body["uncounted"], tuple) else body["uncounted"]
        uncounted = [_READ.require_text(name, at) for at, name in _READ.list_items(names, f"{where}: uncounted")]
        return cls.of(amounts, tuple(uncounted))
