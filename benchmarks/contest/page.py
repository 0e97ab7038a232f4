"""Write the record of one task from its runs; a pure function of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.contestant_names import OURS, OURS_BEFORE, RIVALS, SMALL, STRONGEST, ours
from benchmarks.common.markdown import as_row, with_spread
from benchmarks.common.records import Record
from benchmarks.common.statistics import Cell, Spread, cells, trial_seconds
from benchmarks.contest.gate import refusal, under_newest_recipe
from benchmarks.contest.verdicts import VERDICTS, against, as_times, better_methods, difference_text, speed_ups_of
from benchmarks.tasks.base import concerns

_VERDICT = (
    "the 95 % interval of the difference, by Student's t over the common seeds, is on one side of zero. Of several "
    "variants of a rival the one that is best on the validation part is compared."
)
COLUMNS = ("method", "before surgery", "right after", "fine-tuned", "params", "MACs", "p50 latency", "push", "seeds")


def page(records: Sequence[Record], *, figures: Sequence[str] = (), remarks: str = "") -> str:
    """The page of one task, a pure function of its records (of one scale) and of what its authors remark."""
    records = under_newest_recipe(records)
    first = records[0]
    refused = refusal(records, first["recipe"])
    if refused is not None:
        return _refused_page(first, refused)
    metric, config = first["metric"], first["config"]
    found = cells(records)
    speed_ups = speed_ups_of(found)
    lines = [f"# {first['title']}", "", *_introduction(records, found), ""]
    lines += ["## Findings", "", *_findings(records, found), "", "## Limits", "", *_limits(records, found), ""]
    if remarks:
        lines += ["## Remarks", "", remarks.strip(), ""]
    lines += ["## Terms", "", *_terms(metric), ""]
    for speed_up in speed_ups:
        lines += [f"## {speed_up:g}x fewer multiply-adds", "", *_table(found, speed_up, metric), ""]
        lines += [
            *_impossible(found, speed_up),
            *_marks(_own(found, speed_up, ours(records)), found, metric),
            "",
        ]
    for name in figures:
        lines += [f"![{Path(name).stem.replace('-', ' ')}]({name})", ""]
    lines += ["## How it was run", "", *_conditions(records, config), ""]
    return "\n".join(lines)


def _refused_page(first: Record, reason: str) -> str:
    """A page without tables: under this recipe no figure says anything about a method."""
    return "\n".join([
        f"# {first['title']}", "",
        "The recipe of these runs is refused, so this page has no tables.", "", f"- {reason[0].upper()}{reason[1:]}.",
        f"- Results: `benchmarks/results/runs/{first['config']['task']}.jsonl`.", "",
    ])  # fmt: skip


def _introduction(records: Sequence[Record], found: Sequence[Cell]) -> list[str]:
    methods, config = len({cell.method for cell in found}), records[0]["config"]
    return [
        f"This record compares {methods} methods at {as_times(speed_ups_of(found))} fewer multiply-adds. All see the "
        "same batches in the same order, so that they can be compared.", "",
        f"- Measure: `{_command(records, config)}`.",
        f"- Results: `benchmarks/results/runs/{config['task']}.jsonl`.",
        "- Write the page again without measuring: `python -m benchmarks report`.",
    ]  # fmt: skip


def _findings(records: Sequence[Record], found: Sequence[Cell]) -> list[str]:
    """Sentences that follow from the figures alone."""
    metric, name = records[0]["metric"], ours(records)
    start = Spread.of(list(dict.fromkeys(record["test"]["dense"] for record in records if record["status"] == "ok")))
    unit = " in percent" if metric["percent"] else ""
    better = "more is better" if metric["higher"] else "less is better"
    lines = [f"- The metric is {metric['name']}{unit} on the test part; {better}."]
    dense = next((cell for cell in found if cell.method == "dense" and cell.ok), None)
    if start is not None:
        same = "" if dense is None else (
            f" The unpruned network with the same further training (`dense`) has "
            f"{with_spread(dense.stage('finetuned'), metric)}."
        )  # fmt: skip
        lines.append(f"- The checkpoint has {with_spread(start, metric)}.{same}")
    for speed_up in speed_ups_of(found):
        own = _own(found, speed_up, name)
        if own is None:
            continue
        sorts: dict[str, list[str]] = {}
        for rival in RIVALS:
            result = against(own, found, rival, higher=metric["higher"])
            if not isinstance(result, str):
                sorts.setdefault(result[1].mark, []).append(f"`{result[0].method}`")
        said = "; ".join(f"{VERDICTS[sort]} {', '.join(names)}" for sort in VERDICTS if (names := sorts.get(sort)))
        compared = f" It is {said}." if said else ""
        lines.append(f"- At {speed_up:g}x `{name}` has {with_spread(own.stage('finetuned'), metric)}.{compared}")
        others = [cell for cell in found if cell.ok and cell.speed_up == speed_up and cell is not own]
        if not others:
            lines.append(f"- At {speed_up:g}x no other method has run yet.")
        elif not better_methods(own, found, higher=metric["higher"]):
            lines.append(f"- At {speed_up:g}x no other pruned or narrow network has a better mean than `{name}`.")
    return lines


def _own(found: Sequence[Cell], speed_up: float, name: str) -> Cell | None:
    return next((cell for cell in found if cell.method == name and cell.speed_up == speed_up and cell.ok), None)


def _limits(records: Sequence[Record], found: Sequence[Cell]) -> list[str]:
    """What does not hold: who is ahead of etp, which methods gave nothing, and how much the figures say."""
    metric, name, lines = records[0]["metric"], ours(records), []
    for speed_up in speed_ups_of(found):
        own = _own(found, speed_up, name)
        ahead = [] if own is None else better_methods(own, found, higher=metric["higher"])
        if ahead:
            said = ", ".join(f"`{cell.method}` ({with_spread(cell.stage('finetuned'), metric)})" for cell in ahead)
            lines.append(f"- At {speed_up:g}x these have a better mean than `{name}`: {said}.")
    failed = dict.fromkeys(f"`{cell.method}` at {cell.speed_up:g}x" for cell in found if not cell.ok)
    if failed:
        lines.append(f"- Without a result: {', '.join(failed)}. The reason is below the table.")
    seeds = [len(cell.ok) for cell in found if cell.method == name and cell.ok]
    if seeds:
        few = "1 seed, which says nothing about chance" if max(seeds) == 1 else f"{min(seeds)} seeds"
        several = f"{min(seeds)} to {max(seeds)} seeds" if min(seeds) != max(seeds) else few
        lines.append(f"- The figures of `{name}` come from {several}.")
    else:
        lines.append(f"- There are no runs of `{name}` yet.")
    if records[0]["config"]["scale"] == "cpu":
        lines.append("- The scale is `cpu`: parts of the data, narrower networks and short schedules.")
    if name == OURS_BEFORE:
        lines.append(
            f"- The runs were made when `etp` compared scores across groups, as `{name}` does. It now takes the same "
            "share of every group."
        )
    return lines


def _terms(metric: Mapping[str, Any]) -> list[str]:
    return [
        f"- *Before surgery* (after sparse training), *right after* surgery and *fine-tuned*: {metric['name']} on the "
        "test part, mean ± standard deviation over the seeds. A dash: the method has no such stage.",
        "- *Params*, *MACs* and *p50 latency*: of the dense network, divided by those of the pruned one.",
        f"- *Better* and *worse*: {_VERDICT}",
        "- *Push*: the chosen strength. A star: it is the first or last of those tried.",
    ]


def _table(found: Sequence[Cell], speed_up: float, metric: Mapping[str, Any]) -> list[str]:
    rows = [cell for cell in found if cell.ok and (cell.speed_up == speed_up or cell.method == "dense")]
    lines = [as_row(COLUMNS), "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    for cell in rows:
        stages = [with_spread(cell.stage(stage), metric) for stage in ("sparse", "pruned", "finetuned")]
        ratios = [_ratio(cell.ratio(key)) for key in ("params", "macs", "latency")]
        push = ", ".join(sorted({_push(record) for record in cell.ok}))
        lines.append(as_row((_named(cell.method), *stages, *ratios, push, str(len(cell.ok)))))
    return lines


def _push(record: Record) -> str:
    """The chosen push, with a mark where it was the first or last of several that were tried."""
    pushes = [trial["push"] for trial in record["trials"]]
    if record["push"] is None:
        return "-"
    return f"{record['push']:g}" + ("*" if len(pushes) > 1 and record["push"] in (min(pushes), max(pushes)) else "")


def _impossible(found: Sequence[Cell], speed_up: float) -> list[str]:
    reasons = {
        f"- {_named(cell.method)}: {record['status']}. {record['reason']}"
        for cell in found
        for record in cell.records
        if record["status"] != "ok" and cell.speed_up == speed_up
    }
    return ["Without a result:", "", *sorted(reasons), ""] if reasons else []


def _marks(own: Cell | None, found: Sequence[Cell], metric: Mapping[str, Any]) -> list[str]:
    if own is None:
        return []
    differences = {name: difference_text(own, found, name, metric) for name in (STRONGEST, *RIVALS)}
    return [f"- {own.method} against {name}: {difference}" for name, difference in differences.items()]


def _conditions(records: Sequence[Record], config: Mapping[str, Any]) -> list[str]:
    recipe = next((r for r in records if r["config"]["method"] == SMALL), records[0])["recipe"]
    counted = sorted({record["counted_by"] for record in records if record["status"] == "ok"})
    lines = [
        f"- {sum(record['seconds'] for record in records) / 60:.0f} minutes in all{_tuning_cost(records)}.",
        f"- Checkpoint: {records[0]['checkpoint']}. Seeds vary the order of the data and all that is random in a "
        f"method{'' if 'seed of the run' in records[0]['checkpoint'] else ', not the checkpoint'}.",
        f"- Every method: {recipe['sparse_steps']} + {recipe['finetune_steps']} steps of {recipe['batch_size']} "
        f"examples in the same order, {recipe['optimizer']}, learning rates up to {recipe['sparse_rate']:g} and "
        f"{recipe['finetune_rate']:g}; methods without a force take all of them after surgery. *small-dense* trains "
        f"{recipe['scratch_steps']} steps from fresh weights, at the best of several learning rates, which stand under "
        "push as multiples of the checkpoint's; *dense* is never cut.",
        f"- Strengths: the best of the pushes {', '.join(f'{p:g}' for p in recipe['pushes'])} on the validation part, "
        f"each with {100 * recipe['tune_share']:.0f} % of the steps (`benchmarks/contest/strength.py`)."
        f"{_extended(recipe)}",
        f"- MACs by {' and '.join(counted) or '-'}; latency is the median over forwards of dense and pruned in turns.",
    ]
    if any(concerns(r["recipe"], r["config"]["method"]) != concerns(recipe, r["config"]["method"]) for r in records):
        lines.append("- **The records come from more than one recipe**; the steps above are those of the first.")
    precisions = {r.get("precision", r["recipe"].get("precision", "fp32")) for r in records}
    if len(precisions) > 1:
        found = ", ".join(sorted(precisions))
        lines.append(f"- **The records come from more than one precision of training**: {found}.")
    for name in records[0]["conditions"]:
        values = dict.fromkeys(record["conditions"].get(name, "-") for record in records)
        lines.append(f"- {name}: {', '.join(values)}")
    return [*lines, f"- commit: {', '.join(dict.fromkeys(record['commit'] for record in records))}"]


def _tuning_cost(records: Sequence[Record]) -> str:
    """Trials of strengths and what they took beside the runs; empty where lines do not tell them apart."""
    cost: dict[str, list[float]] = {}
    for (method, _, _), seconds in trial_seconds(records).items():
        cost.setdefault(method, []).append(seconds)
    if not cost:
        return ""
    each = ", ".join(f"`{m}` {len(s)} trials in {sum(s) / 3600:.1f} hours" for m, s in cost.items())
    return f", and {sum(map(sum, cost.values())) / 3600:.1f} hours of tuning: {each}"


def _extended(recipe: Mapping[str, Any]) -> str:
    more = recipe.get("extensions", 0)
    return f" While the best is at an edge, up to {more} further ones beyond it are tried, and counted." if more else ""


def _command(records: Sequence[Record], config: Mapping[str, Any]) -> str:
    methods = " ".join(dict.fromkeys(record["config"]["method"] for record in records))
    speeds = sorted({record["config"]["speed_up"] for record in records if record["config"]["method"] != "dense"})
    seeds = sorted({record["config"]["seed"] for record in records})
    return (
        f"python -m benchmarks contest {config['task']} --methods {methods} "
        f"--speed-ups {' '.join(f'{s:g}' for s in speeds)} "
        f"--seeds {' '.join(map(str, seeds))} --scale {config['scale']}"
    )


def _named(method: str) -> str:
    return f"**{method}**" if method in (OURS, OURS_BEFORE) else method


def _ratio(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.mean:.2f}x"
