"""Data of a report, read from a folder that :func:`etp_graph.compress` or :func:`etp_graph.save` wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etp_graph._json import shorten
from etp_graph.budget import Budget
from etp_graph.checkpoint import MANIFEST_FILE, READER, WEIGHTS_FILE, Manifest, read_manifest, read_weights
from etp_graph.compression import JOURNAL_FILE, StepResult, model_folder, read_journal, read_plan, read_tensors
from etp_graph.errors import CheckpointError, EtpError
from etp_graph.methods import Method
from etp_graph.plan import Cost, Group, LatencyFit, Plan, Selection, as_tensor, parse_selection

SHOWN = 9
"""Largest number of groups whose norms are shown. They are evenly spaced in the order of execution."""

POINTS = 400
"""Largest number of units shown for a group. They are evenly spaced in the order of distance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStage:
    """The model after one stage of the run. Values that the folder does not hold are ``None``, or not in ``amounts``.

    ``amounts`` is what the cost counts, by name of the quantity.
    """

    name: str
    metric: float | None = None
    amounts: Mapping[str, int] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def macs(self) -> int | None:
        """Multiply-adds of one forward."""
        return self.amounts.get("macs")

    @property
    def params(self) -> int | None:
        """Numbers in the parameters."""
        return self.amounts.get("params")


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """Number of units of a group before and after all rounds.

    ``locked`` is the reason why the group is locked. ``kind`` and ``locked`` are empty if they are unknown.
    """

    name: str
    before: int
    after: int
    kind: str = ""
    locked: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NormHistogram:
    """Distance and norm of units of a group after sparse training, and which of them stayed; ``units`` counts all."""

    name: str
    distance: Sequence[float]
    norm: Sequence[float]
    kept: Sequence[bool]
    units: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """Content of a report.

    Attributes:
        title: one line.
        facts: settings and versions, name -> text.
        stages: the stages of the run, beginning with the dense model.
        widths: the groups, in the order of execution if the folder holds the plan.
        norms: number of the round (from 1) -> norms of the groups that are shown.
        latency: target, prediction and measurement of a target in time; ``None`` for other targets.
        unfinished: True if the run did not finish its last stage.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    stages: Sequence[MeasuredStage] = ()
    widths: Sequence[Width] = ()
    norms: Mapping[int, Sequence[NormHistogram]] = field(default_factory=dict)
    latency: LatencyFit | None = None
    unfinished: bool = False


def read_report_data(path: str | os.PathLike[str]) -> ReportData:
    """Read the content of a report from a folder that ``compress(checkpoint=...)`` or :func:`etp_graph.save` wrote.

    Raises:
        CheckpointError: the folder holds neither a run nor a saved model, or is damaged.
    """
    folder = Path(path).absolute()
    if os.path.lexists(folder / JOURNAL_FILE):
        return _of_run(folder)
    if os.path.lexists(folder / MANIFEST_FILE):
        return _of_model(folder)
    raise CheckpointError(
        f"{folder}: holds neither {JOURNAL_FILE} nor {MANIFEST_FILE}. Name the folder that compress(checkpoint=...) or "
        "etp_graph.save wrote."
    )


def _of_model(folder: Path) -> ReportData:
    manifest = read_manifest(folder)
    selections = [_sizes(text, str(folder)) for text in manifest.record.selections]
    return ReportData(
        title=f"Saved model {folder.name}",
        facts=_manifest_facts(manifest),
        widths=_widths(selections, None),
    )


def _of_run(folder: Path) -> ReportData:
    arguments, steps = read_journal(folder / JOURNAL_FILE)
    try:
        method = Method.from_json({k.removeprefix("method."): v for k, v in arguments.items() if k[:7] == "method."})
        budget = Budget.from_json(arguments["budget"])
        by_name = {str(step["step"]).partition("-")[2]: step for step in steps}
        rounds = min(method.rounds, len(steps))  # a round has several steps; a damaged number may be huge
        return ReportData(
            title=f"{method.name}: {budget.as_given}",
            facts=_facts(folder, method, budget, steps),
            stages=list(_stages(by_name, rounds, many=method.rounds > 1)),
            widths=_widths(_selections(folder, by_name, rounds), _plan(folder, by_name, 0)),
            norms={r + 1: found for r in range(rounds) if (found := list(_norms(folder, by_name, r)))},
            latency=_latency(by_name),
            unfinished=f"evaluate-finetuned-{method.rounds - 1}" not in by_name,
        )
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, EtpError):  # such as a force that is not registered in this process
            raise
        raise CheckpointError(
            f"{folder / JOURNAL_FILE}: a step lacks what it should say ({shorten(error)}). "
            "Restore the folder from a copy."
        ) from error


def _latency(by_name: Mapping[str, StepResult]) -> LatencyFit | None:
    found = by_name.get("prune-0", {}).get("latency")  # runs with a target in time have one round
    return None if found is None else LatencyFit.from_dict(found)


def _facts(folder: Path, method: Method, budget: Budget, steps: Sequence[StepResult]) -> dict[str, str]:
    last = next((step for step in reversed(steps) if step["weights"]), None)
    manifest = _manifest_facts(read_manifest(model_folder(folder, last))) if last is not None else {}
    own = {name: _text(value) for name, value in method.to_dict().items()}
    asked = {f"budget, {name}": _text(value) for name, value in json.loads(budget.to_json()).items()}
    return {**{f"method, {name}": text for name, text in own.items()}, **asked, **manifest}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _manifest_facts(manifest: Manifest) -> dict[str, str]:
    return {
        "numbers stored": f"{sum(prod(info.shape) for info in manifest.tensors.values()):,}",
        "size of the weights": f"{manifest.n_bytes:,} bytes",
        "SHA-256 of the weights": manifest.sha256,
        **{f"written by {name}": version for name, version in manifest.libraries.items()},
    }


def _stages(by_name: Mapping[str, StepResult], rounds: int, *, many: bool) -> Iterator[MeasuredStage]:
    """Yield the finished stages: dense, then sparse, pruned and fine-tuned of each round."""
    if (dense := by_name.get("evaluate-dense-0")) is None:
        return
    cost = Cost.from_json(dense["cost"]) if "cost" in dense else None  # folders of older versions lack it
    yield _stage("dense", dense, cost, dense)
    for number in range(rounds):
        of = f" {number + 1}" if many else ""
        for name, work in (("sparse", "sparse"), ("pruned", "prune"), ("finetuned", "finetune")):
            found, done = by_name.get(f"evaluate-{name}-{number}"), by_name.get(f"{work}-{number}")
            if found is None or done is None:
                continue
            cost = Cost.from_json(done["cost"]) if work == "prune" else cost
            yield _stage(f"{name}{of}", found, cost, done)


def _stage(name: str, measured: StepResult, cost: Cost | None, work: StepResult) -> MeasuredStage:
    metric = float(measured["metric"])
    if not isfinite(metric):
        raise ValueError(f"metric {metric} of {name}")
    return MeasuredStage(
        name=name, metric=metric, seconds=float(work["seconds"]),
        amounts=cost.amounts if cost else {},
    )  # fmt: skip


Sizes = dict[str, tuple[int, int]]
"""Name of a group -> number of its units before and after a round."""


def _selections(folder: Path, by_name: Mapping[str, StepResult], rounds: int) -> list[Sizes]:
    steps = [by_name[f"prune-{number}"] for number in range(rounds) if f"prune-{number}" in by_name]
    return [_sizes(step["selection"], str(folder)) for step in steps]


def _sizes(selection: object, where: str) -> Sizes:
    """Return the sizes in the JSON of a selection, without masks, which many rounds would fill the memory with."""
    found = parse_selection(READER, selection, where)
    return {name: (size, size - len(removed)) for name, (size, removed) in found.items()}


def _plan(folder: Path, by_name: Mapping[str, StepResult], number: int) -> Plan | None:
    """Return the plan of a round, or ``None`` if the folder does not hold it (folders of older versions)."""
    step = by_name.get(f"trace-{number}" if number else "evaluate-dense-0")
    return None if step is None else read_plan(folder, step)


def _widths(selections: Sequence[Sizes], plan: Plan | None) -> list[Width]:
    """Return the widths of all groups, in the order of execution if the plan is known."""
    found: dict[str, Width] = {}
    if plan is not None:
        for group in sorted(plan.groups, key=lambda group: _position(plan, group)):
            n, why = group.n_units, group.locked or ""
            found[group.name] = Width(name=group.name, before=n, after=n, kind=group.kind, locked=why)
    for selection in selections:
        for name, (before, after) in selection.items():
            found[name] = replace(found.get(name, Width(name=name, before=before, after=before)), after=after)
    return list(found.values())


def _position(plan: Plan, group: Group) -> int:
    """Return the position of the group in the order of execution: the number of its first term in ``plan.ops``."""
    tensors = {piece.tensor for piece in group.slices}
    made = [i for i, op in enumerate(plan.ops) if op.name == group.name]
    used = [i for i, op in enumerate(plan.ops) if any(name in tensors for name, _ in op.axes)]
    return min(made or used, default=len(plan.ops))


def _norms(folder: Path, by_name: Mapping[str, StepResult], number: int) -> Iterator[NormHistogram]:
    """Yield norms at the end of the sparse phase of a round, if a force acted in it and the folder holds its plan."""
    sparse, plan = by_name.get(f"sparse-{number}"), _plan(folder, by_name, number)
    distance = read_tensors(folder, sparse).get("distance") if sparse is not None else None
    if sparse is None or plan is None or distance is None or len(distance) != plan.n_units:
        return
    home = model_folder(folder, sparse)
    norms = _group_norms(plan, read_weights(home / WEIGHTS_FILE, read_manifest(home)))
    chosen = by_name.get(f"prune-{number}")
    keep = torch.ones(plan.n_units, dtype=torch.bool, device="cpu")
    if chosen is not None:
        keep = Selection.from_json(chosen["selection"]).flat(plan)
    spans = [(group, span) for group, span in plan.spans() if group.locked is None and group.n_units > 1]
    spans.sort(key=lambda pair: _position(plan, pair[0]))
    every = -(-len(spans) // SHOWN)
    for group, span in spans[:: max(every, 1)]:
        order = distance[span].argsort()[:: -(-group.n_units // POINTS)]
        parts = [values[span][order] for values in (distance, norms, keep)]
        if bool(parts[1].isfinite().all()):  # infinite and NaN norms cannot be drawn
            yield NormHistogram(
                name=group.name, distance=parts[0].tolist(), norm=parts[1].tolist(), kept=parts[2].tolist(),
                units=group.n_units,
            )  # fmt: skip


def _group_norms(plan: Plan, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the norm ‖w_u‖ over all slices of each unit, [n_units].

    ``weights`` holds tied parameters only under their first names.
    """
    total = torch.zeros(plan.n_units, device="cpu")
    own = set(plan.parameters)
    for group, span in plan.spans():
        for piece in group.slices:
            if piece.tensor in own and piece.tensor in weights and not piece.passive:
                squares = weights[piece.tensor].float().square()
                sums = squares.movedim(piece.axis, 0).flatten(1).sum(1) if squares.ndim > 1 else squares
                total[span].index_add_(0, as_tensor(piece.unit), sums[as_tensor(piece.index)])
    return total.sqrt()
