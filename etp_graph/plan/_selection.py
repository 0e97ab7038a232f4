"""Selection, and latencyfit (the record of how a target in time was met)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import BoolTensor, Tensor

from etp_graph._json import JsonReader, shorten
from etp_graph.errors import PlanError, SelectionError

from ._groups import MAX_UNITS
from ._plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyFit:
    """Result of the search for a target in time. All times are medians of forwards with the example inputs.

    Attributes:
        target_ms: the target.
        predicted_ms: predicted time of the pruned model before it was measured.
        measured_ms: measured time of the pruned model.
        dense_ms: measured time of the dense model, in turns with the pruned one.
        iterations: number of the iteration that gave this selection, counted from 1; 0 if all units stay.
        round_to: the multiple that the numbers of kept units were rounded to. If it was chosen from measured times,
            only groups with at least four times as many units were rounded. By kind if the budget gives it by kind.
        layers: for each timed module its milliseconds by the tables: in the dense model, and with the selection's
            sizes. Their sums are smaller than the times of the models, because not every operator has a table.
    """

    target_ms: float
    predicted_ms: float
    measured_ms: float
    dense_ms: float
    iterations: int
    round_to: int | Mapping[str, int]
    layers: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def speed_up(self) -> float:
        """Return the measured time of the dense model divided by that of the pruned one."""
        return self.dense_ms / self.measured_ms

    @property
    def miss(self) -> float:
        """Return the relative excess of the measured time over the target; negative if the model is faster."""
        return self.measured_ms / self.target_ms - 1

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as a dict that JSON can store."""
        return {**asdict(self), "layers": {name: list(pair) for name, pair in self.layers.items()}}

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> LatencyFit:
        """Return the fit that :meth:`to_dict` wrote. Raise :class:`PlanError` for anything else."""
        where, read = "this is not the fit of a latency", JsonReader(PlanError)
        values = read.require_object(
            dict(body) if isinstance(body, Mapping) else body, where, _FIT, optional=("layers",)
        )
        layers = {
            name: _pair(read, pair, place)
            for place, name, pair in read.list_entries(values.get("layers", {}), f"{where}: layers")
        }
        times = {
            name: read.require_number(values[name], f"{where}: {name}", low=0) for name in _FIT if name.endswith("_ms")
        }
        if not times["target_ms"] or not times["measured_ms"]:
            read.refuse(where, "a time is zero")
        at, given = f"{where}: round_to", values["round_to"]
        multiples: int | dict[str, int]
        if isinstance(given, dict):
            multiples = {
                kind: read.require_integer(value, place) for place, kind, value in read.list_entries(given, at)
            }
        else:
            multiples = read.require_integer(given, at)
        iterations = read.require_integer(values["iterations"], f"{where}: iterations")
        return cls(**times, iterations=iterations, round_to=multiples, layers=layers)

    def __str__(self) -> str:
        return (
            f"target {self.target_ms:.3f} ms, predicted {self.predicted_ms:.3f} ms, "
            f"measured {self.measured_ms:.3f} ms ({self.speed_up:.2f}x; dense {self.dense_ms:.3f} ms)"
        )


_FIT = ("target_ms", "predicted_ms", "measured_ms", "dense_ms", "iterations", "round_to")


def _pair(read: JsonReader, value: Any, where: str) -> tuple[float, float]:
    pair = tuple(read.require_number(entry, place, low=0) for place, entry in read.list_items(value, where))
    if len(pair) != 2:
        read.refuse(where, f"expected two times, got {shorten(value)}")
    return pair[0], pair[1]


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Units that stay. Groups that are not named keep all units.

    Attributes:
        keep: group name -> True for units that stay, bool [n_units of the group].
        latency: target, prediction and measurement of a latency budget; ``None`` for other budgets. Not in the JSON.
    """

    keep: Mapping[str, BoolTensor]
    latency: LatencyFit | None = None

    @classmethod
    def from_flat(cls, plan: Plan, keep: Tensor) -> Selection:
        """Make a selection from one flat bool ``[plan.n_units]`` vector."""
        if tuple(keep.shape) != (plan.n_units,):
            raise SelectionError(f"expected a flat vector of shape [{plan.n_units}], got {list(keep.shape)}.")
        flat = keep.detach().to("cpu", torch.bool)
        return cls({group.name: flat[span].clone() for group, span in plan.spans()})  # type: ignore[misc]

    def flat(self, plan: Plan) -> BoolTensor:
        """Return the selection as one bool ``[plan.n_units]`` vector on the CPU."""
        parts = [self.keep.get(g.name, torch.ones(g.n_units, dtype=torch.bool, device="cpu")) for g in plan.groups]
        return torch.cat([part.cpu() for part in parts]) if parts else torch.ones(0, dtype=torch.bool, device="cpu")  # type: ignore

    def check(self, plan: Plan) -> None:
        """Raise :class:`SelectionError` unless the selection fits the groups and the constraints of the plan."""
        known = {group.name: group for group in plan.groups}
        for name, keep in self.keep.items():
            if name not in known:
                raise SelectionError(f"the selection names a group {name!r} that the plan does not have.")
            known[name].check_keep(keep)

    @property
    def n_removed(self) -> int:
        """Return the number of units removed."""
        return sum(int((~keep).sum()) for keep in self.keep.values())

    def to_json(self) -> str:
        """Return the selection as JSON text: group name -> [number of units, removed units]."""
        return json.dumps({name: [len(k), (~k).nonzero().flatten().tolist()] for name, k in self.keep.items()})

    @classmethod
    def from_json(cls, text: str) -> Selection:
        """Return the selection that :meth:`to_json` wrote. Raise :class:`SelectionError` for any other text."""
        keep: dict[str, BoolTensor] = {}
        for name, (size, removed) in parse_selection(_READER, text, "this text is not a selection").items():
            mask = torch.ones(size, dtype=torch.bool, device="cpu")
            mask[torch.tensor(removed, dtype=torch.int64, device="cpu")] = False
            keep[name] = mask  # type: ignore[assignment]
        return cls(keep)


_READER = JsonReader(SelectionError)


def parse_selection(reader: JsonReader, text: object, where: str) -> dict[str, tuple[int, list[int]]]:
    """Return for each group in the JSON of a selection its number of units, and the units that go; build no mask.

    Args:
        reader: raises the errors.
        text: what :meth:`Selection.to_json` wrote.
        where: the text's place, for errors.

    Raises:
        Exception: the error of ``reader``. The text is not a selection, or it names more than :data:`MAX_UNITS` units.
    """
    found: dict[str, tuple[int, list[int]]] = {}
    total = 0
    for place, name, entry in reader.list_entries(reader.parse(text, where, fractions=False), where):
        pair = reader.require_list(entry, place)
        if len(pair) != 2:
            reader.refuse(place, f"expected [units, removed units], got {shorten(entry)}")
        size = reader.require_integer(pair[0], place, high=MAX_UNITS)
        removed = [reader.require_integer(unit, place, high=size - 1) for unit in reader.require_list(pair[1], place)]
        reader.require_unique(removed, place)
        found[name] = size, removed
        total += size
    if total > MAX_UNITS:
        reader.refuse(where, f"{total} units, more than {MAX_UNITS}")
    return found
