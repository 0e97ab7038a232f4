"""The comparison of `etp` with others over several tasks: a table, counts of verdicts, and what the controls do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.common.contestant_names import OURS, RIVALS, STRONGEST, UNPRUNED, ours
from benchmarks.common.markdown import as_row, with_spread
from benchmarks.common.records import Record
from benchmarks.common.statistics import Cell, cells
from benchmarks.contest.gate import loss_of, pairs_of, refusal_of
from benchmarks.contest.verdicts import (
    NO_VERDICT,
    VERDICTS,
    as_times,
    better_methods,
    difference_text,
    speed_ups_of,
    verdict_on,
)

Pages = Mapping[str, Sequence[Record]]
"""Records of a task at one scale, by the name of their page."""


def table(pages: Pages) -> list[str]:
    """The metric of etp on some tasks, and the difference to its rivals."""
    names, own = (STRONGEST, *RIVALS), _ours(pages)
    columns = ("task", "metric", "speed-up", "control", own, *(f"against {name}" for name in names), "seeds")
    lines = [as_row(columns), as_row(["---"] * len(columns))]
    for name, records in pages.items():
        found, metric = cells(records), records[0]["metric"]
        for cell in sorted((c for c in found if c.method == ours(records)), key=lambda c: c.speed_up):
            spread = cell.stage("finetuned")
            apart = [difference_text(cell, found, other, metric) for other in names]
            lines.append(as_row((
                f"[{records[0]['title']}]({name}.md)", metric["name"], f"{cell.speed_up:g}x", control_of(records),
                with_spread(spread, metric), *apart, str(spread.n if spread else 0),
            )))  # fmt: skip
    return lines


def _ours(pages: Pages) -> str:
    """The method that is compared with others; of pages that differ in it, both names."""
    return " / ".join(dict.fromkeys(ours(records) for records in pages.values())) or OURS


TABLE = (
    "The table has the metric of this library's method on the test part and the mean difference to others over the "
    "common seeds with its 95 % interval, in the units of the metric. Of several variants of a rival the one that is "
    "best on the validation part is compared, and named; *the strongest* is the best of all others there. *Control* is "
    "what the unpruned network gains on the validation part by the same further training."
)


def control_of(records: Sequence[Record]) -> str:
    """By how much the unpruned control is better than its checkpoint on the validation part."""
    pairs = control_pairs(records)
    if not pairs:
        return "-"
    metric = records[0]["metric"]
    gained = -fmean(loss_of(metric, *pair) for pair in pairs)
    return f"{100 * gained:+.2f}" if metric["percent"] else f"{100 * gained:+.1f} %"


def control_pairs(records: Sequence[Record]) -> list[tuple[float, float]]:
    """The metrics of checkpoint and unpruned control on the validation part, for each seed."""
    return pairs_of([record for record in records if record["config"]["method"] == UNPRUNED and "val" in record])


def harmed(pages: Pages) -> list[str]:
    """In how many tasks the unpruned control loses more than full size allows."""
    found = {name: pairs for name, records in pages.items() if (pairs := control_pairs(records))}
    if not found:
        return []
    lost = [name for name, pairs in found.items() if refusal_of(pages[name][0]["metric"], pairs) is not None]
    return [
        f"- In {len(lost)} of {len(found)} tasks the unpruned control loses more than 0.3 points (1 % of other "
        "metrics), which the protocol refuses at full size."
    ]


def verdicts(pages: Pages) -> list[str]:
    """How often etp is better or worse than each rival, over tasks and speed-ups."""
    lines, own = [], cells_of_etp(pages)
    for name in (STRONGEST, *RIVALS):
        said: Counter[str] = Counter()
        for cell, found, metric in own:
            said[verdict_on(cell, found, name, higher=metric["higher"])] += 1
        counts = ", ".join(f"{sort} in {said[sort]}" for sort in VERDICTS)
        open_ = (NO_VERDICT, "not possible", "no such run yet")
        rest = "".join(f"; {sort} in {said[sort]}" for sort in open_ if said[sort])
        if own:
            lines.append(f"- Against {name}, of {len(own)} tasks and speed-ups: `{_ours(pages)}` is {counts}{rest}.")
    return lines or [f"- There are no runs of `{_ours(pages)}` yet."]


def cells_of_etp(pages: Pages) -> list[tuple[Cell, list[Cell], Mapping[str, Any]]]:
    """The cells of etp, each with all cells of its task and the metric."""
    grouped = [(ours(records), cells(records), records[0]["metric"]) for records in pages.values()]
    return [
        (cell, found, metric) for name, found, metric in grouped for cell in found if cell.method == name and cell.ok
    ]


def behind(pages: Pages) -> list[str]:
    """In how many tasks and speed-ups another method has a better mean than etp."""
    own = cells_of_etp(pages)
    n = sum(bool(better_methods(cell, found, higher=metric["higher"])) for cell, found, metric in own)
    if not own:
        return []
    return [
        f"- In {n} of {len(own)} tasks and speed-ups another method has a better mean than `{_ours(pages)}` on the "
        "test part. The page of the task names it."
    ]


def contents(records: Sequence[Record]) -> str:
    """What the page of a task has, in one phrase."""
    found = cells(records)
    methods = len({cell.method for cell in found})
    return f"compares {methods} methods by {records[0]['metric']['name']} at {as_times(speed_ups_of(found))}"
