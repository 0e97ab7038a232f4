"""Write ``docs/results/speed.md`` and ``speed-measurements.md`` from what :mod:`benchmarks.speed.run` found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common.records import with_new_names
from benchmarks.speed.settings import PLANS, STEPS

Found = dict[str, Any]
GIGA = 2**30

_HEAD = """# Speed

This record measures the cost of the force, of plans, of budgets and of surgery. It compares each with the model's own
training step, with Torch-Pruning, or with a lower limit from memory access.
[The second page](speed-measurements.md) has every measurement.

- Measure: `python -m benchmarks speed`.
- Results: `benchmarks/results/speed-cpu.json`, {minutes:.0f} minutes.
- Write the pages again without measuring: `python -m benchmarks report`.
- Machine and versions: {device}, {cpus} cores; torch {torch}, torch-pruning {torch-pruning}.

## Findings

{findings}

## Limits

{limits}

## Targets, one thread

{targets}

## Terms

- *Force*: the additional time of `optimizer.step()` with an attached `Regularizer` (`mode="prox"`, default kinds of
  units). For the method `etp` it includes the choice of units and, at some steps, reading the gradients, over the 20
  steps between two choices in a phase of 1,000 steps.
- *Limit*: `torch._foreach_norm` and `torch._foreach_mul_` on the same tensors. They read every prunable parameter once,
  and then read and write it once.
- *Trace*: `trace(..., check=False)`, that is the graph and all groups. The check is on by default and takes several
  times as long; [its cost](check-cost.md) has a record of its own.
- *Torch-Pruning*: `GroupNormPruner.regularize`; `build_dependency` and `get_all_groups`; building a pruner and one step
  of it (ratio 0.3 everywhere).
- Each measurement runs in a process of its own. Figures are medians of {repetitions} repetitions, in which the
  variants that are compared take turns.

## Why the force is above the limit

A weight whose units lie along one axis (attention, feed-forward) is read once and written once: row sums are one
`vector_norm`, column sums one `einsum`. A convolution between two prunable layers has units along both axes. Its
squares are written to a buffer that stays in the cache and are summed twice, and the weight is multiplied twice.
PyTorch has no operator that sums or scales a matrix along both axes in one pass. This explains the ratio for ResNet-50.
As a share of a training step it is small. In models of many small layers, as ResNet-56, the cost is that of calls, not
of memory.
"""

_ALL = """# Speed, all measurements

This page lists every measurement of [the record on speed](speed.md), which explains the terms.

"""


@dataclass(frozen=True, slots=True)
class Target:
    """A row of the table: what, how it is read from the measurements, what it may be at most."""

    what: str
    value: Callable[[Found], float]
    most: float
    form: str
    peer: Callable[[Found], float] | None = None


def _share(found: Found, *, probe: str, name: str, key: str = "force") -> float:
    row = found[f"{probe}/{name}/1"]
    return float(row[key]["median"] / row["forward_backward"]["median"])


def _limit(found: Found, *, name: str) -> float:
    row = found[f"force/{name}/1"]
    return float(row["force"]["median"] / row["limit"]["median"])


def _held(found: Found, *, probe: str, name: str) -> float:
    row = found[f"{probe}/{name}/1"]
    return float(row["held"] / row["parameters"])


def _trace(found: Found, *, probe: str, name: str, over: str | None = None) -> float:
    seconds = float(found[f"{probe}/{name}/1"]["trace"]["median"])
    return seconds if over is None else seconds / _trace(found, probe=probe, name=over)


def _cut(found: Found, *, probe: str, name: str, keys: Sequence[str] = ("prune_",)) -> float:
    return float(sum(found[f"{probe}/{name}/1"][key]["median"] for key in keys))


def _over(found: Found, *, name: str) -> float:
    row = found[f"surgery/{name}/1"]
    return float(row["peak"] / row["made"])


def _meta(found: Found, *, key: str, unit: float = 1.0) -> float:
    value = found["meta/Llama, 6.7 billion parameters/1"][key]
    return float(value["median"] if isinstance(value, dict) else value) / unit


def targets() -> list[Target]:
    """The table, in the order of the page."""
    small, middle, large, dense, vit = PLANS
    most = dict(zip(STEPS, (0.01, 0.03, 0.04, 0.06), strict=True))
    all_of_it = ("scores", "allocate", "prune_")
    return [
        *(Target(f"force, share of forward + backward: {name}", partial(_share, probe="force", name=name), most[name],
                 "share", partial(_share, probe="force_peer", name=name)) for name in STEPS),
        *(Target(f"the same with `every=8`: {name}", partial(_share, probe="force", name=name, key="eighth"), 0.01,
                 "share") for name in STEPS),
        *(Target(f"the same of the method `etp`: {name}", partial(_share, probe="steered", name=name), most[name],
                 "share") for name in STEPS),
        *(Target(f"force against the limit: {name}", partial(_limit, name=name), 1.5, "ratio")
          for name in (STEPS[3], STEPS[1])),
        *(Target(f"memory of an attached regularizer, share of the parameters: {name}",
                 partial(_held, probe="force", name=name), 0.02, "share", partial(_held, probe="force_peer", name=name))
          for name in STEPS),
        *(Target(f"trace: {name}", partial(_trace, probe="trace", name=name), seconds, "seconds",
                 partial(_trace, probe="trace_peer", name=name))
          for name, seconds in ((middle, 0.5), (dense, 2.0), (vit, 0.5))),
        *(Target(f"trace: {name} against {over.partition(', ')[2]}",
                 partial(_trace, probe="trace", name=name, over=over), 5, "ratio",
                 partial(_trace, probe="trace_peer", name=name, over=over))
          for name, over in ((middle, small), (large, middle))),
        *(Target(f"`allocate` to half of the MACs: {name}",
                 partial(_cut, probe="surgery", name=name, keys=("allocate",)), 0.05, "seconds")
          for name in (vit, middle)),
        *(Target(f"scores + allocate + `prune_` to half of the MACs: {name}",
                 partial(_cut, probe="surgery", name=name, keys=all_of_it), seconds, "seconds",
                 partial(_cut, probe="surgery_peer", name=name)) for name, seconds in ((dense, 1.0), (vit, 0.7))),
        Target(f"peak memory of `prune_` beyond the model, over the tensors that it makes: {vit}",
               partial(_over, name=vit), 1.1, "ratio"),
        Target("plan and budget of a Llama of 6.7 billion parameters on the meta device", partial(_meta, key="plan"),
               20, "seconds"),
        Target("the same: peak memory of the process", partial(_meta, key="peak", unit=GIGA), 2, "GiB"),
        Target("the same: weights allocated", partial(_meta, key="allocated"), 0, "number"),
    ]  # fmt: skip


def _written(value: float, form: str) -> str:
    if form == "share":
        return f"{value:.2%}"
    if form == "seconds":
        return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"
    return {"ratio": f"{value:.2f}x", "GiB": f"{value:.2f} GiB"}.get(form, f"{value:.0f}")


def _read(read: Callable[[Found], float] | None, found: Found) -> float | None:
    try:
        return None if read is None else read(found)
    except KeyError:  # not measured, or the process gave no answer
        return None


def table(found: Found) -> str:
    """The targets as a Markdown table."""
    lines = ["| what | target | measured | | Torch-Pruning |", "|---|---:|---:|---|---:|"]
    for row in targets():
        value, peer = _read(row.value, found), _read(row.peer, found)
        verdict = "not measured" if value is None else "pass" if value <= row.most else "**missed**"
        theirs = "" if row.peer is None else "no answer" if peer is None else _written(peer, row.form)
        shown = "" if value is None else _written(value, row.form)
        lines.append(f"| {row.what} | ≤ {_written(row.most, row.form)} | {shown} | {verdict} | {theirs} |")
    return "\n".join(lines)


def _all(found: Found) -> str:
    """Every measurement: median and, in brackets, the lowest and the highest."""
    lines = ["| measurement | threads | what | median | lowest to highest |", "|---|---:|---|---:|---:|"]
    for key, row in found.items():
        probe, name, threads = key.split("/", 1)[0], key.split("/", 1)[1].rpartition("/")[0], key.rpartition("/")[2]
        if "verdict" in row:
            lines.append(f"| {probe}: {name} | {threads} | {row['verdict'][:100]} | | |")
        for what, value in row.items():
            if isinstance(value, dict):
                low, high = _written(value["low"], "seconds"), _written(value["high"], "seconds")
                shown = f"{value['median'] * 1e3:.2f} ms"
                lines.append(f"| {probe}: {name} | {threads} | {what} | {shown} | {low} to {high} |")
            elif what in ("held", "transient", "prunable", "parameters", "largest", "peak"):
                lines.append(f"| {probe}: {name} | {threads} | {what} | {value / 2**20:.2f} MiB | |")
    return "\n".join(lines)


def _findings(found: Found) -> list[str]:
    """Sentences that follow from the figures alone."""
    lines = []
    met = {row.what: (row, value) for row in targets() if (value := _read(row.value, found)) is not None}
    missed = sum(value > row.most for row, value in met.values())
    if met:
        lines.append(f"- {len(met) - missed} of {len(met)} targets are met.")
    for start, text in (
        ("force, share", "- The force takes {own} of a forward and backward pass, Torch-Pruning's {theirs}"),
        ("memory of", "- An attached regularizer holds {own} of the parameters' memory, Torch-Pruning's {theirs}"),
        (
            "scores + allocate",
            "- Scores, `allocate` and `prune_` to half of the MACs take {own}, "
            "Torch-Pruning's step at ratio 0.3 {theirs}",
        ),
    ):
        rows = [(row, value) for what, (row, value) in met.items() if what.startswith(start)]
        peers = [peer for row, _ in rows if (peer := _read(row.peer, found)) is not None]
        if rows and peers:
            form = rows[0][0].form
            own = _range([value for _, value in rows], form)
            names = "; ".join(row.what.partition(": ")[2] for row, _ in rows)
            lines.append(f"{text.format(own=own, theirs=_range(peers, form))} ({names}).")
    whole = [met[key] for key in met if key.startswith("plan and budget of a Llama")]
    lines += [f"- {row.what[0].upper()}{row.what[1:]}: {_written(value, row.form)}." for row, value in whole]
    return lines or ["- Nothing was measured."]


def _range(values: Sequence[float], form: str) -> str:
    low, high = (_written(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _limits(found: Found) -> list[str]:
    """Missed targets, and what the figures do not show."""
    lines = []
    for row in targets():
        value = _read(row.value, found)
        if value is None:
            lines.append(f"- Not measured: {row.what}.")
        elif value > row.most:
            shown = f"{_written(value, row.form)}, target ≤ {_written(row.most, row.form)}"
            lines.append(f"- Target missed: {row.what} ({shown}).")
    return [*lines, "- All figures come from one machine. Ratios are meaningful on other machines, seconds are not."]


def write_page(body: Found, path: Path) -> None:
    """Write the summary with the targets to ``path``, and all measurements to ``NAME-measurements.md`` beside it."""
    found = body["measurements"]
    text = _HEAD.format(
        repetitions=body["repetitions"], minutes=body["seconds"] / 60, findings="\n".join(_findings(found)),
        limits="\n".join(_limits(found)), targets=table(found), **with_new_names(body["conditions"]),
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf8")
    path.with_name(f"{path.stem}-measurements.md").write_text(f"{_ALL}{_all(found)}\n", encoding="utf8")
