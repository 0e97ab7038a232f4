"""The papers' tables and figures, row by row: ``python -m benchmarks reproduce``.

Every row of the papers (:mod:`benchmarks.papers.published`) stands beside the run here that comes closest to it, with
a status. Without a name it writes the page of all rows; with the name of a table it prints that table. ``figure3``
trains a network under each method and draws the norms of two units over the steps; ``figure4`` draws the metric against
the speed-up of every task with runs.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.common import figures as plots
from benchmarks.common.contestant_names import UNPRUNED
from benchmarks.common.markdown import as_row
from benchmarks.common.records import PAGES, RUNS, Record, by_scale, read_records, task_files
from benchmarks.common.statistics import Cell, Spread, cells
from benchmarks.papers.norms_figure import draw_norms
from benchmarks.papers.published import ERRATA, SOURCES, TABLES, PublishedRow, published_rows, rows_of
from benchmarks.tasks import SCALES, TASKS, TaskUnavailableError, make

COLUMNS = ("row", "network, data", "method", "speed-up", "paper's", "ours", "method, speed-up here", "status")
FULL, SMALLER, RECIPE = "reproduced at full size", "smaller", "recipe only"
NEAR = 1.5
"""A run counts for a row if its speed-up is at most this many times larger or smaller."""
_SCALES = ("paper", "full", "cpu")
"""Which runs stand for a row, the largest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What stands beside a row.

    Attributes:
        cell: the runs of the contestant at the nearest speed-up; ``None``: none is near.
        status: one of the three, with the reason or the difference behind a colon.
    """

    cell: Cell | None
    status: str


def match(row: PublishedRow, records: Sequence[Record]) -> Match:
    """Find the runs that come closest to a row, and say how close."""
    setting = row.setting
    if row.obstacle:
        return Match(cell=None, status=f"{RECIPE}: {row.obstacle}")
    if row.paper == "ETP" and row.table == "figures 1 and 3":
        return Match(cell=None, status=f"{RECIPE}: `{command(row)}` draws the norms")
    scales = by_scale([record for record in records if record["config"]["task"] == setting.task])
    for contestant in row.contestants:
        for scale in _SCALES:
            found = nearest(cells(scales.get(scale, [])), contestant, row.speed_up or setting.speed_up)
            if found is None:
                continue
            if not found.ok:
                last = found.records[-1]
                return Match(cell=None, status=f"{RECIPE}: run here, {last['status']}: {last['reason']}")
            full = scale in setting.full_scales
            return Match(cell=found, status=FULL if full else f"{SMALLER}: {_size(found)}")
    if row.pruned is None and row.drop is None:
        return Match(cell=None, status=f"{RECIPE}: the paper prints no figure")
    why = f"{setting.why}; " if setting.task == "ppi" else ""
    return Match(cell=None, status=f"{RECIPE}: {why}no run near it yet, `{command(row)}`")


def nearest(found: Sequence[Cell], contestant: str, speed_up: float) -> Cell | None:
    """The runs of a contestant at the nearest speed-up; ``None`` if none is within :data:`NEAR`."""
    own = [cell for cell in found if cell.method == contestant]
    near = [cell for cell in own if contestant == UNPRUNED or _far(cell, speed_up) <= log(NEAR) + 1e-9]
    return min(near, key=lambda cell: (not cell.ok, _far(cell, speed_up)), default=None)


def _far(cell: Cell, speed_up: float) -> float:
    return abs(log(cell.speed_up / speed_up))


def _size(cell: Cell) -> str:
    recipe = cell.ok[0]["recipe"]
    steps = recipe["sparse_steps"] + recipe["finetune_steps"]
    return f"{cell.ok[0]['title']}, {steps:,} steps of {recipe['batch_size']}"


def command(row: PublishedRow) -> str:
    """How the row is run at the largest size that there is here."""
    setting = row.setting
    if row.table == "figures 1 and 3":
        return f"python -m benchmarks reproduce figure3 --task {setting.task} --scale paper"
    scale = next((scale for scale in (*setting.full_scales, "full") if scale in SCALES), "paper")
    start = f"python -m benchmarks contest {setting.task} --scale {scale} --methods {row.contestants[0]}"
    speed_up = row.speed_up or setting.speed_up
    return start if row.contestants == (UNPRUNED,) else f"{start} --speed-ups {speed_up:g}"


def table(name: str, records: Sequence[Record]) -> str:
    """One table of a paper as Markdown, from the records of all tasks."""
    title, _ = TABLES[name]
    lines = [f"# {title}", "", as_row(COLUMNS), "| ---: | --- | --- | ---: | --- | --- | --- | --- |"]
    lines += [as_row(_cells(row, match(row, records))) for row in rows_of(name)]
    return "\n".join([*lines, ""])


def _cells(row: PublishedRow, found: Match) -> list[str]:
    speed_up = "-" if row.speed_up is None else f"{row.speed_up:g}x"
    own, which = ("-", "-") if found.cell is None else (_change(found.cell), _which(found.cell))
    where = f"{row.model}, {row.data}" + (f" ({row.metric})" if row.metric else "")
    return [str(row.number), where, row.method, speed_up, row.printed, own, which, found.status]


def _which(cell: Cell) -> str:
    return f"`{cell.method}`, {cell.speed_up:g}x" if cell.speed_up != 1 else f"`{cell.method}`"


def _change(cell: Cell) -> str:
    """The metric of the checkpoint and at the end, and further metrics at the end."""
    dense, end = cell.stage("dense"), cell.stage("finetuned")
    assert dense is not None
    assert end is not None
    metric = cell.ok[0]["metric"]
    by, digits = (100.0, 2) if metric["percent"] else (1.0, 3)
    shown = [spread.text(percent=metric["percent"], digits=digits) for spread in (dense, end)]
    details = [record.get("details", {}) for record in cell.ok]
    others = ""
    for name in details[0]:
        spread = Spread.of([one[name] for one in details if name in one])
        others += f"; {name} {spread.text(digits=3)}" if spread is not None else ""
    change = by * (end.mean - dense.mean)
    return f"{metric['name']} {shown[0].split(' ')[0]} to {shown[1]} ({change:+.{digits}f}){others}"


def write_page(records: Sequence[Record], path: Path) -> None:
    """All tables on one page."""
    found = [match(row, records) for row in published_rows()]
    status = Counter(one.status.partition(":")[0] for one in found)
    lines = [
        "# Beside the papers", "",
        "This record puts every row of the tables of the papers on ETP and Torque beside the run of this repository "
        "that comes closest to it.", "",
        *(f"- {name}: {source}." for name, source in SOURCES.items()),
        "- The rows, as printed: `benchmarks/papers/published_rows.jsonl`.",
        "- Measure: `python -m benchmarks contest`. Results: `benchmarks/results/runs`.",
        "- Write the page again without measuring: `python -m benchmarks reproduce`.", "",
        "## Findings", "",
        *(f"- {status[name]} of {len(found)} rows: {name}." for name in (FULL, SMALLER, RECIPE)), "",
        "## Limits", "",
        f"- *{FULL.capitalize()}* means the network and the data of the paper. Schedules are shorter: the papers train "
        "for 100 to 200 epochs. ETP resizes CIFAR images to 224 pixels, here they have 32, as in the paper on Torque.",
        f"- *{SMALLER.capitalize()}* means the same kind of network on the same kind of data, with what is different "
        "behind the colon.",
        f"- *{RECIPE.capitalize()}* means that there is no such run here, with the reason or the command.",
        f"- A run stands beside a row if its speed-up is at most {NEAR:g} times larger or smaller. Only the change "
        "against the checkpoint can be compared.",
        "- Changes in the column *paper's* are as printed: ETP writes pruned minus base, Torque base minus pruned.",
        "- Where there are no runs of `torque-published` (the paper's own rule), runs of `torque` (this library's "
        "variant) stand beside Torque.", "",
    ]  # fmt: skip
    lines += [f"#{table(name, records)}" for name in TABLES]
    lines += ["## Errors in published figures, not copied", "", *(f"- {error}" for error in ERRATA), ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks reproduce", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "what", nargs="?", default="all", choices=["all", *TABLES, "figure3", "figure4"],
        help="all (default): write the page of all rows; a table: print it",
    )  # fmt: skip
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder with the JSON lines")
    parser.add_argument("--out", type=Path, default=PAGES, help="folder of the page and the figures")
    parser.add_argument("--task", choices=list(TASKS), default="cifar100", help="of figure3")
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="of figure3")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, for figure3")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    files = task_files(options.runs)
    if options.what == "figure3":
        torch.set_num_threads(options.threads)
        try:
            console.print(f"wrote {draw_norms(make(options.task, options.scale), options.out)}")
        except TaskUnavailableError as error:
            parser.exit(2, f"{options.task}: {error}\n")
    elif options.what == "figure4":
        (options.out / "images").mkdir(parents=True, exist_ok=True)
        for file in files:
            for scale, records in by_scale(read_records(file)).items():
                name = f"figure4-{file.stem}-{scale}"
                console.print(f"wrote {plots.plot_curves(records, options.out / 'images', name)}")
    else:
        _tables(options.what, [record for file in files for record in read_records(file)], options.out, console)


def _tables(what: str, records: Sequence[Record], out: Path, console: Console) -> None:
    """Print one table, or write the page of all."""
    if what in TABLES:
        sys.stdout.write(table(what, records))
        return
    write_page(records, out / "papers.md")
    console.print(f"wrote {out / 'papers.md'}", highlight=False)
