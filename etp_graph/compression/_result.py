"""Result of a compression: every metric, cost and selection, printed as a table or stored as JSON."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from etp_graph._json import JsonReader, shorten
from etp_graph._text import aligned
from etp_graph.budget import Budget
from etp_graph.errors import EtpError
from etp_graph.methods import Method
from etp_graph.plan import MAX_UNITS, Cost, LatencyFit, Selection, described_quantity

FORMAT = 1

DIVERGENCE = 0.25
"""Relative difference between measured speed-up and speed-up in MACs above which there is a warning."""


class SpeedUpDiverges(UserWarning):
    """The measured speed-up and the one in MACs differ by more than a quarter."""


_READ = JsonReader(EtpError)

_MAX_UNITS = 4 * MAX_UNITS

_ROUND = (
    "metric_sparse", "metric_pruned", "metric_finetuned", "cost", "selection", "fingerprint", "seconds",
)  # fmt: skip

_RESULT = ("format", "method", "budget", "dense", "metric_dense", "rounds", "seconds_dense")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Round:
    """One round of sparse training, surgery and fine-tuning.

    Attributes:
        metric_sparse: metric after sparse training; ``None`` if the method has no sparse phase.
        metric_pruned: metric right after surgery.
        metric_finetuned: metric after fine-tuning.
        cost: cost of the pruned model.
        selection: which units of the model at the start of the round stayed.
        fingerprint: fingerprint of the round's plan.
        seconds: seconds of each step: ``sparse``, ``calibrate``, ``prune``, ``finetune``, ``evaluate``. The first two
            are missing if the method does not have them.
        latency: target, prediction and measurement, if the target is a time.
    """

    metric_sparse: float | None
    metric_pruned: float
    metric_finetuned: float
    cost: Cost
    selection: Selection
    fingerprint: str
    seconds: Mapping[str, float]
    latency: LatencyFit | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return every field as a value that JSON can store."""
        return {
            "metric_sparse": self.metric_sparse,
            "metric_pruned": self.metric_pruned,
            "metric_finetuned": self.metric_finetuned,
            "cost": self.cost.to_dict(),
            "selection": json.loads(self.selection.to_json()),
            "fingerprint": self.fingerprint,
            "seconds": dict(self.seconds),
            "latency": None if self.latency is None else self.latency.to_dict(),
        }

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Round:
        """Return the round that :meth:`to_dict` wrote. Raise :class:`EtpError` for anything else."""
        where = "this is not a round of a result"
        values = _READ.require_object(
            dict(body) if isinstance(body, Mapping) else body, where, _ROUND, optional=("latency",)
        )
        seconds = {
            name: _READ.require_number(value, at, low=0)
            for at, name, value in _READ.list_entries(values["seconds"], where)
        }
        metric_sparse, latency = values["metric_sparse"], values.get("latency")
        return cls(
            metric_sparse=None
            if metric_sparse is None
            else _READ.require_number(metric_sparse, f"{where}: metric_sparse"),
            metric_pruned=_READ.require_number(values["metric_pruned"], f"{where}: metric_pruned"),
            metric_finetuned=_READ.require_number(values["metric_finetuned"], f"{where}: metric_finetuned"),
            cost=Cost.from_json(_READ.require_object(values["cost"], f"{where}: cost")),
            selection=Selection.from_json(json.dumps(values["selection"])),
            fingerprint=_READ.require_text(values["fingerprint"], f"{where}: fingerprint"),
            seconds=seconds,
            latency=None if latency is None else LatencyFit.from_dict(latency),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CompressResult:
    """Result of :func:`etp_graph.compress`; ``print(result)`` shows a table.

    Attributes:
        method: the method.
        budget: the budget.
        dense: cost of the dense model.
        metric_dense: metric of the dense model.
        rounds: results of each round, at least one.
        seconds_dense: seconds of the evaluation of the dense model.
    """

    method: Method
    budget: Budget
    dense: Cost
    metric_dense: float
    rounds: tuple[Round, ...]
    seconds_dense: float = 0.0

    def __post_init__(self) -> None:
        if not self.rounds:
            raise EtpError("a result without rounds says nothing: every run has at least one.")

    @property
    def metric_sparse(self) -> float | None:
        """Metric after the last sparse phase; ``None`` if the method has no sparse phase."""
        return self.rounds[-1].metric_sparse

    @property
    def metric_pruned(self) -> float:
        """Metric right after the last surgery."""
        return self.rounds[-1].metric_pruned

    @property
    def metric_finetuned(self) -> float:
        """Metric after the last fine-tuning."""
        return self.rounds[-1].metric_finetuned

    @property
    def pruned(self) -> Cost:
        """Cost of the pruned model."""
        return self.rounds[-1].cost

    @property
    def selections(self) -> tuple[Selection, ...]:
        """The units that stayed, one selection for each round."""
        return tuple(one.selection for one in self.rounds)

    @property
    def speed_up(self) -> float:
        """Dense MACs divided by the pruned model's MACs."""
        return self.dense.macs / max(self.pruned.macs, 1)

    @property
    def latency(self) -> LatencyFit | None:
        """Target, prediction and measurement of the last surgery, if the target is a time."""
        return self.rounds[-1].latency

    def warn_if_diverging(self) -> None:
        """Warn if time was measured and the measured speed-up differs too much from the one in MACs."""
        fit = self.latency
        if fit is None or abs(fit.speed_up / self.speed_up - 1) <= DIVERGENCE:
            return
        warnings.warn(
            f"the pruned model is {fit.speed_up:.2f}x as fast as the dense one, its MACs say {self.speed_up:.2f}x: "
            "what is not counted (norms, activations, memory, calls) takes its time, or widths do not suit the "
            "kernels. Judge by the measured one.",
            SpeedUpDiverges,
            stacklevel=3,
        )

    @property
    def asked(self) -> str:
        """Target of the budget in words, such as ``speed_up=2.0``."""
        return self.budget.as_given

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each step, summed over the rounds; see :class:`etp_graph.compression.Round`.

        ``evaluate`` includes the dense model.
        """
        total = {"sparse": 0.0, "prune": 0.0, "finetune": 0.0, "evaluate": self.seconds_dense}
        for one in self.rounds:
            for step, seconds in one.seconds.items():
                total[step] = total.get(step, 0.0) + seconds
        return total

    def to_json(self) -> str:
        """Return the result as JSON text; :meth:`from_json` reads it back."""
        return json.dumps({
            "format": FORMAT,
            "method": self.method.to_dict(),
            "budget": self.budget.to_dict(),
            "dense": self.dense.to_dict(),
            "metric_dense": self.metric_dense,
            "rounds": [one.to_dict() for one in self.rounds],
            "seconds_dense": self.seconds_dense,
        })  # fmt: skip

    @classmethod
    def from_json(cls, text: str) -> CompressResult:
        """Return the result that :meth:`to_json` wrote.

        Raises:
            EtpError: the text is not such a result.
        """
        where = "this text is not a result of compress"
        body = _READ.require_object(_READ.parse(text, where), where)
        if type(body.get("format")) is not int or body["format"] != FORMAT:
            found = shorten(body.get("format"))
            raise EtpError(f"result format {found} is unknown; this version reads format {FORMAT}.")
        _READ.require_object(body, where, _RESULT)
        return cls(
            method=Method.from_json(_READ.require_object(body["method"], f"{where}: method")),
            budget=Budget.from_json(_READ.require_object(body["budget"], f"{where}: budget")),
            dense=Cost.from_json(_READ.require_object(body["dense"], f"{where}: dense")),
            metric_dense=_READ.require_number(body["metric_dense"], f"{where}: metric_dense"),
            rounds=tuple(_rounds(body["rounds"], f"{where}: rounds")),
            seconds_dense=_READ.require_number(body["seconds_dense"], f"{where}: seconds_dense", low=0),
        )

    def __str__(self) -> str:
        others = [described_quantity(name).title for name in self.dense.others]
        rows: list[tuple[str, ...]] = [("stage", "metric", "MACs", "speed-up", "params", *others, "seconds")]
        rows.append(self._row("dense", self.metric_dense, self.dense, self.seconds_dense))
        before = self.dense
        for number, one in enumerate(self.rounds, 1):
            of = f" {number}" if len(self.rounds) > 1 else ""
            if one.metric_sparse is not None:
                rows.append(self._row(f"sparse{of}", one.metric_sparse, before, one.seconds.get("sparse", 0.0)))
            rows.append(self._row(f"pruned{of}", one.metric_pruned, one.cost, one.seconds.get("prune", 0.0)))
            rows.append(self._row(f"finetuned{of}", one.metric_finetuned, one.cost, one.seconds.get("finetune", 0.0)))
            before = one.cost
        reached = (
            f"{self.speed_up:.2f}x reached" if self.latency is None else f"{self.speed_up:.2f}x in MACs; {self.latency}"
        )
        title = f"{self.method.name}: {self.asked} asked, {reached}"
        return "\n".join([title, *aligned(rows)])

    def _row(self, stage: str, metric: float, cost: Cost, seconds: float) -> tuple[str, ...]:
        speed_up = self.dense.macs / max(cost.macs, 1)
        others = (f"{cost.others[name]:,}" if name in cost.others else "-" for name in self.dense.others)
        counted = f"{cost.macs:,}", f"{speed_up:.2f}x", f"{cost.params:,}", *others
        return stage, f"{metric:.4f}", *counted, f"{seconds:.1f}"


def _rounds(value: Any, where: str) -> Iterator[Round]:
    """Yield the rounds of a result. Raise :class:`EtpError` once their masks would fill the memory."""
    total = 0
    for place, entry in _READ.list_items(value, where):
        found = Round.from_dict(entry)
        total += sum(len(keep) for keep in found.selection.keep.values())
        if total > _MAX_UNITS:
            _READ.refuse(place, f"more than {_MAX_UNITS} units in all rounds")
        yield found
