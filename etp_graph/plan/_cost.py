"""The cost of one forward: multiply-adds and parameters."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from etp_graph.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one forward with the example inputs costs.

    Attributes:
        macs: multiply-adds.
        params: numbers in the parameters (buffers are not parameters).
        uncounted: operators that ran and are not in ``macs``.
    """

    macs: int
    params: int
    uncounted: tuple[str, ...] = ()

    def to_json(self) -> str:
        """As JSON text; :meth:`from_json` reads it back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Cost:
        """The cost that :meth:`to_json` wrote. Raises :class:`PlanError` if the text is something else."""
        try:
            body = json.loads(text)
            macs, params, uncounted = body["macs"], body["params"], tuple(body["uncounted"])
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"this text is not a cost: {error!r}") from error
        if type(macs) is not int or type(params) is not int or not all(isinstance(name, str) for name in uncounted):
            raise PlanError(f"this text is not a cost: macs {macs!r}, params {params!r}, uncounted {uncounted!r}.")
        return cls(macs=macs, params=params, uncounted=uncounted)
