"""Write the page for a reader who believes nothing: question, protocol, figures, what does not hold, hours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.common.contestant_names import UNPRUNED
from benchmarks.common.markdown import as_row, with_spread
from benchmarks.common.records import Record
from benchmarks.common.statistics import cells, trial_seconds
from benchmarks.contest.verdicts import as_times, speed_ups_of
from benchmarks.papers.published import PublishedRow, published_rows
from benchmarks.papers.reproduce import nearest
from benchmarks.report import comparison, contrasts
from benchmarks.report.comparison import Pages

_HEAD = """# Evidence

This page asks whether the exponential force of Exponential Torque Pruning (Modi et al. 2025) makes pruned networks
better, and whether `etp`, the default of this library, is better than other methods. Only runs at full size count:
whole data sets, and training under which the unpruned network keeps its accuracy. Short runs are in
[the archive](archive.md) and support no claim.
"""

_PROTOCOL = """## Protocol

- All methods begin with one checkpoint, see the same batches in the same order, and take as many steps at the same
  learning rates.
- The learning rate is chosen by the unpruned network alone. If it loses more than 0.3 points (1 % of other metrics)
  against its checkpoint in the same steps, no method is run.
- A strength is tuned on the validation part at the full length of a run, by the same number of trials for everybody.
  `etp` has none.
- The test part is read once for each finished network. The last step counts, not the best.
- Intervals are those of Student's t at 95 % over the seeds that both methods have.
- `etp` was designed on the short runs and on validation parts (see [the study](study.md)). It was changed once after
  tables here were begun: it compared scores across groups, and now takes the same share of every group. [Validation
  parts](study-full.md) decided this, but the first test figures were known. What it was stands in the tables as
  `etp-global`; its rivals were never changed.

[All rules](../benchmarks.md), and how baselines are run.
"""

_PARTS = """## What each part of `etp` earns

Two methods that differ in one thing are compared on the same seeds. Positive: the left one is better. The unit is
points of a metric in percent, and percent of other metrics.
"""


def evidence(pages: Pages, *, remarks: str = "", figure: str | None = None) -> str:
    """The page, a pure function of the records at full size.

    Args:
        pages: records by the name of their page.
        remarks: what follows, in words; of what figures cannot say.
        figure: file of the drawn contrasts.
    """
    effects = contrasts.effects(pages)
    lines = [_HEAD, _PROTOCOL, "## What holds, and what does not", "", *comparison.verdicts(pages)]
    lines += [*comparison.behind(pages), *_missing(pages), ""]
    if remarks:
        lines += [remarks.strip(), ""]
    parts = (f"- **{one.part}**: `{one.left}` minus `{one.right}`; {one.what}." for one in contrasts.CONTRASTS)
    lines += [_PARTS, *parts, ""]
    lines += [*contrasts.table(effects), ""] if effects else ["No contrast has three common seeds yet.", ""]
    if figure:
        lines += [f"![What each part earns]({figure})", "", "*Filled: fine-tuned. Hollow: right after surgery.*", ""]
    lines += ["## `etp` against others", "", comparison.TABLE, "", *comparison.table(pages), ""]
    lines += ["## Beside the papers", "", *_beside(pages), "", "## Hours and commands", "", *_hours(pages), ""]
    return "\n".join(lines)


def _missing(pages: Pages) -> list[str]:
    """What the runs lack."""
    seeds = {name: {record["config"]["seed"] for record in records} for name, records in pages.items()}
    few = [records[0]["title"] for name, records in pages.items() if len(seeds[name]) < 3]
    lines = [f"- Tasks with runs: {len(pages)}. `python -m benchmarks contest status` lists what is missing."]
    return lines + ([f"- Fewer than three seeds: {'; '.join(few)}."] if few else [])


def _beside(pages: Pages) -> list[str]:
    """Every row of ETP and DepGraph in the papers beside runs at full size, where there are some near it."""
    by_task = {records[0]["config"]["task"]: records for records in pages.values()}
    rows = [row for row in published_rows() if row.method in ("ETP", "DepGraph", "Torque", "Torque (p)")]
    shown = [as_row(one) for row in rows if (one := _row(row, by_task)) is not None]
    if not shown:
        return ["No row of the papers has a run near it yet. [All 110 rows](papers.md)"]
    return [
        "The papers train for 100 to 200 epochs and begin with other weights, so only changes can be compared. "
        "DepGraph is run again by Torch-Pruning's own code. [All 110 rows](papers.md)", "",
        as_row(("network, data", "method", "speed-up", "paper's", "ours", "method, speed-up here", "seeds")),
        "| --- | --- | ---: | --- | --- | --- | ---: |", *shown,
    ]  # fmt: skip


def _row(row: PublishedRow, by_task: Mapping[str, Sequence[Record]]) -> tuple[str, ...] | None:
    """A row of a paper beside ours; None without a run near it."""
    records = by_task.get(row.setting.task or "")
    if records is None or row.speed_up is None:
        return None
    every, metric = cells(records), records[0]["metric"]
    near = (nearest(every, name, row.speed_up) for name in row.contestants)
    found = next((cell for cell in near if cell is not None and cell.ok), None)
    if found is None:
        return None
    start, end = found.stage("dense"), found.stage("finetuned")
    ours = f"{with_spread(start, metric)} to {with_spread(end, metric)}"
    which = f"`{found.method}`" + ("" if found.method == UNPRUNED else f", {found.speed_up:g}x")
    return f"{row.model}, {row.data}", row.method, f"{row.speed_up:g}x", row.printed, ours, which, str(len(found.ok))


def _hours(pages: Pages) -> Iterator[str]:
    """What each task took, and how it is repeated."""
    yield as_row(("task", "speed-ups", "methods", "runs", "hours of runs", "hours of tuning", "command"))
    yield "| --- | --- | ---: | ---: | ---: | ---: | --- |"
    total = 0.0
    for name, records in pages.items():
        found, config = cells(records), records[0]["config"]
        hours = sum(record["seconds"] for record in records) / 3600
        tuning = sum(trial_seconds(records).values()) / 3600
        total += hours + tuning
        yield as_row((
            f"[{records[0]['title']}]({name}.md)", as_times(speed_ups_of(found)), str(len({c.method for c in found})),
            str(len(records)), f"{hours:.1f}", f"{tuning:.1f}",
            f"`python -m benchmarks contest queue --tasks {config['task']}`",
        ))  # fmt: skip
    yield ""
    yield f"{total:.1f} hours of one thread in all, without training checkpoints and choosing learning rates."
