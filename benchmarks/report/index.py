"""Write the list of all records, with the comparison of `etp` with others on all tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.common.contestant_names import RIVALS, UNPRUNED
from benchmarks.common.markdown import as_row, with_spread
from benchmarks.common.records import Record
from benchmarks.common.statistics import Cell, cells
from benchmarks.contest.gate import GATED, loss_of, pairs_of, refusal_of
from benchmarks.contest.verdicts import VERDICTS, as_times, better_methods, difference_text, speed_ups_of, verdict_on

MORE = {
    "coverage": ("Coverage", "checks the plan of each model of the registry, beside plain Torch-Pruning"),
    "coverage-sweep": ("Coverage of models that nobody chose", "checks the default call on models that libraries list"),
    "graph-sources": ("Two sources of plans", "compares the plans of labels with those of Torch-Pruning's graph"),
    "speed": ("Speed", "measures the cost of the force, of plans, of budgets and of surgery"),
    "check-cost": ("Cost of the check", "measures `trace` and `verify` in forwards of the dense model"),
    "latency": ("Latency", "compares the speed-up in multiply-adds with that in time, and checks budgets in time"),
    "scale": ("Scale", "measures what the force sends and costs on several ranks, and models it for up to 1,024 GPUs"),
    "export": ("Export", "exports pruned models with `torch.export`, `torch.compile` and ONNX"),
    "families": ("Families that load what was exported", "loads pruned models with the stock classes of transformers"),
    "serving": ("A served language model", "runs a pruned SmolLM2 in engines without this library"),
    "encoder": ("A served sentence encoder", "runs a pruned MiniLM in sentence-transformers and ONNX Runtime"),
    "study": ("The study behind `etp`", "compares `etp` with variants of it that differ in one thing each"),
    "llm": ("A language model without training", "compares methods that prune SmolLM2-135M without training it"),
    "llm-recovery": ("A language model with a few minutes of training", "trains the pruned SmolLM2 in four ways"),
    "oneshot": ("Networks without training", "compares methods on a ResNet-56, a BERT and a GAT"),
    "llm-streamed": ("A language model that is not loaded", "measures memory and time of `etp.oneshot` on folders"),
    "gradual": ("Single weights or whole units", "compares masks on weights, removed units and a narrow network"),
    "papers": ("Beside the papers", "compares the runs with the figures of the papers, row by row"),
}
"""Title and contents of the records that are not of one task."""


_OVERVIEW = (
    "*After fine-tuning, at the highest speed-up of each task, the best above; mean and standard deviation over the "
    "seeds. Hollow: controls; `dense`, dashed, is never cut and takes as many steps. Dotted: the checkpoint.*"
)


def index(pages: Mapping[str, Sequence[Record]], more: Iterable[str] = (), figure: str | None = None) -> str:
    """The list of all records with one sentence each, and the comparison of etp with others on all tasks.

    Args:
        pages: records by the name of their page.
        more: names of further pages.
        figure: file of the overview.
    """
    full = {name: records for name, records in pages.items() if records[0]["config"]["scale"] in GATED}
    short = {name: records for name, records in pages.items() if name not in full}
    lines = [
        "# Results", "",
        "This page lists the records of measurements. Each begins with its command, its findings and its limits; "
        "tables follow. [The protocol](../benchmarks.md) has the rules of the comparison.", "",
        "## Findings", "",
        "Only tasks at full size count here: whole data sets, and recipes under which the unpruned network keeps its "
        "accuracy in training on.", "",
        *_verdicts(full), "",
        "Better and worse mean by more than one standard deviation of the difference over the common seeds.", "",
        "## Limits", "", *_behind(full), *_missing(full), *_harmed(short),
        "- A task with a single seed gives no verdict.", "",
        "## Records", "",
        *(f"- [{MORE[name][0]}]({name}.md) {MORE[name][1]}." for name in more),
        *(f"- [{records[0]['title']}]({name}.md) {_contents(records)}." for name, records in full.items()), "",
        *(["## Comparison at full size", "", *_table(full), ""] if full else []),
    ]  # fmt: skip
    if short:
        lines += [
            "## Archive: short schedules", "",
            "These records use parts of the data, narrower networks and minutes of training. They were made to choose "
            "among variants. Where the unpruned control loses much, they measure how methods get on with a network "
            "that is being damaged, and support no claim.", "",
            *_verdicts(short), "",
            *(f"- [{records[0]['title']}]({name}.md) {_contents(records)}." for name, records in short.items()), "",
            *([f"![All methods on every task]({figure})", "", _OVERVIEW, ""] if figure else []),
            *_table(short), "",
        ]  # fmt: skip
    return "\n".join(lines)


def _table(pages: Mapping[str, Sequence[Record]]) -> list[str]:
    """The comparison of etp with its rivals on some tasks."""
    columns = ("task", "metric", "speed-up", "control", "etp", *(f"etp against {name}" for name in RIVALS), "seeds")
    lines = [
        "The table has the metric of `etp` on the test part and the mean difference to others over the common seeds, "
        "in the units of the metric. *Control* is what the unpruned network gains on the validation part by the same "
        "further training. Write it again: `python -m benchmarks report`.", "",
        as_row(columns), as_row(["---"] * len(columns)),
    ]  # fmt: skip
    for name, records in pages.items():
        found, metric = cells(records), records[0]["metric"]
        for cell in sorted((c for c in found if c.method == "etp"), key=lambda c: c.speed_up):
            spread = cell.stage("finetuned")
            against = [difference_text(cell, found, other, metric) for other in RIVALS]
            lines.append(as_row((
                f"[{records[0]['title']}]({name}.md)", metric["name"], f"{cell.speed_up:g}x", _control(records),
                with_spread(spread, metric), *against, str(spread.n if spread else 0),
            )))  # fmt: skip
    return lines


def _control(records: Sequence[Record]) -> str:
    """By how much the unpruned control is better than its checkpoint on the validation part."""
    pairs = _control_pairs(records)
    if not pairs:
        return "-"
    metric = records[0]["metric"]
    gained = -fmean(loss_of(metric, *pair) for pair in pairs)
    return f"{100 * gained:+.2f}" if metric["percent"] else f"{100 * gained:+.1f} %"


def _control_pairs(records: Sequence[Record]) -> list[tuple[float, float]]:
    """The metrics of checkpoint and unpruned control on the validation part, for each seed."""
    return pairs_of([record for record in records if record["config"]["method"] == UNPRUNED and "val" in record])


def _harmed(pages: Mapping[str, Sequence[Record]]) -> list[str]:
    """In how many tasks the unpruned control loses more than full size allows."""
    found = {name: pairs for name, records in pages.items() if (pairs := _control_pairs(records))}
    harmed = [name for name, pairs in found.items() if refusal_of(pages[name][0]["metric"], pairs) is not None]
    if not found:
        return []
    return [
        f"- In {len(harmed)} of {len(found)} tasks of the archive the unpruned control loses more than 0.3 points (1 % "
        "of other metrics), which the protocol refuses at full size."
    ]


def _missing(pages: Mapping[str, Sequence[Record]]) -> list[str]:
    """What full size lacks."""
    seeds = {name: {record["config"]["seed"] for record in records} for name, records in pages.items()}
    few = [name for name, found in seeds.items() if len(found) < 3]
    lines = [
        f"- Tasks with runs at full size: {len(pages)}. `python -m benchmarks contest status` lists what is missing."
    ]
    return lines + ([f"- Fewer than three seeds: {', '.join(few)}."] if few else [])


def _verdicts(pages: Mapping[str, Sequence[Record]]) -> list[str]:
    """How often etp is better or worse than each rival, over tasks and speed-ups."""
    lines, own = [], _all_of_etp(pages)
    for name in RIVALS:
        said: Counter[str] = Counter()
        for cell, found, metric in own:
            said[verdict_on(cell, found, name, higher=metric["higher"])] += 1
        counts = ", ".join(f"{sort} in {said[sort]}" for sort in ("better", "within one deviation", "worse"))
        rest = "".join(f"; {sort} in {n}" for sort, n in said.items() if sort not in VERDICTS)
        if own:
            lines.append(f"- Against {name}, of {len(own)} tasks and speed-ups: `etp` is {counts}{rest}.")
    return lines or ["- There are no runs of `etp` yet."]


def _all_of_etp(pages: Mapping[str, Sequence[Record]]) -> list[tuple[Cell, list[Cell], Mapping[str, Any]]]:
    """The cells of etp, each with all cells of its task and the metric."""
    grouped = [(cells(records), records[0]["metric"]) for records in pages.values()]
    return [(cell, found, metric) for found, metric in grouped for cell in found if cell.method == "etp" and cell.ok]


def _behind(pages: Mapping[str, Sequence[Record]]) -> list[str]:
    """In how many tasks and speed-ups another method has a better mean than etp."""
    own = _all_of_etp(pages)
    n = sum(bool(better_methods(cell, found, higher=metric["higher"])) for cell, found, metric in own)
    if not own:
        return []
    return [
        f"- In {n} of {len(own)} tasks and speed-ups another method has a better mean than `etp`. "
        "The page of the task names it."
    ]


def _contents(records: Sequence[Record]) -> str:
    """The sentence of a task in the list of records."""
    found = cells(records)
    methods = len({cell.method for cell in found})
    return f"compares {methods} methods by {records[0]['metric']['name']} at {as_times(speed_ups_of(found))}"
