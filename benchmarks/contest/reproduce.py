"""The papers' tables and figures, row by row: ``python -m benchmarks reproduce table1`` to ``table5``, and figures.

A table puts what was measured here beside what was published. Rows have other sizes, data and schedules than those of
the papers: the difference to the checkpoint is what compares. ``figure3`` trains two networks and draws the norms of
their units against the distance from the pivot; ``figure4`` draws the metric against the speed-up of every task with
runs.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.common import figures as plots
from benchmarks.common.contestant_names import RIVALS
from benchmarks.common.records import PAGES, RUNS, Record, by_scale, read_records, task_files
from benchmarks.common.statistics import Cell, cells, rival
from benchmarks.contest.contestants import Start, library_method
from benchmarks.contest.published import ERRATA, TABLES, Row
from benchmarks.contest.strength import reference
from benchmarks.contest.training import checkpoint, train
from benchmarks.tasks import SCALES, TASKS, Task, TaskUnavailableError, make
from etp_graph.methods import Method
from etp_graph.units import Units

COLUMNS = ("row", "ours (etp)", "paper's", "DepGraph re-run here", "status")
OPEN = "—"


def table(name: str, records: Sequence[Record]) -> str:
    """The table as Markdown, from the records of all tasks."""
    title, rows = TABLES[name]
    lines = [f"# {title}", "", "| " + " | ".join(COLUMNS) + " |", "| --- |" + " --- |" * (len(COLUMNS) - 1)]
    lines += ["| " + " | ".join(_cells(row, records)) + " |" for row in rows]
    sources = dict.fromkeys(row.source for row in rows if row.source)
    lines += ["", *(f"- Published figures: {source}" for source in sources)]
    lines += [f"- Full size: {recipe}" for recipe in dict.fromkeys(_recipe(row) for row in rows)]
    return "\n".join([*lines, ""])


def write_page(records: Sequence[Record], path: Path) -> None:
    """All tables on one page."""
    status = Counter(_cells(row, records)[-1].partition(",")[0] for _, rows in TABLES.values() for row in rows)
    known = sum(row.published is not None for _, rows in TABLES.values() for row in rows)
    lines = [
        "# Beside the papers", "",
        "This record compares the runs of this repository with the figures of the papers on ETP and Torque, row by row."
        " Sizes, data and schedules differ, so only the change against the checkpoint can be compared.", "",
        "- Measure: `python -m benchmarks contest`; each row has its command for the full size.",
        "- Results: `benchmarks/results/runs`.",
        "- Write the page again without measuring: `python -m benchmarks reproduce all`.", "",
        "## Findings", "",
        *(f"- {n} of {status.total()} rows: {what}." for what, n in status.most_common()),
        f"- {known} rows have a published figure with a known source.", "",
        "## Limits", "",
        "- *Reproduced small* means the same task, narrower, with less data and a shorter schedule, at the nearest "
        "speed-up that was run.",
        "- *Recipe only* means that nobody has run the row here. Its command is below the table.",
        "- No row reproduces a figure of a paper at its size." if not status["reproduced"] else
        f"- Only {status['reproduced']} rows were run at the size of the paper.", "",
    ]  # fmt: skip
    lines += [f"#{table(name, records)}" for name in TABLES]
    lines += ["## Errors in published figures, not copied", "", *(f"- {error}" for error in ERRATA), ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf8")


def _cells(row: Row, records: Sequence[Record]) -> list[str]:
    own = [record for record in records if record["config"]["task"] == row.task]
    scales = by_scale(own)
    found = cells(scales.get("paper") or scales.get("cpu") or [])
    near = sorted((c for c in found if c.method == "etp" and c.ok), key=lambda c: abs(log(c.speed_up / row.speed_up)))
    etp = near[0] if near else None
    speed_up = row.speed_up if etp is None else etp.speed_up
    peer = next((r for name in list(RIVALS)[:2] if (r := rival(found, name, speed_up))), None)
    status = "recipe only" if etp is None else ("reproduced" if "paper" in scales else "reproduced small")
    if etp is not None and speed_up != row.speed_up:
        status += f", at {speed_up:g}x"
    return [row.what, _change(etp), row.published or OPEN, _change(peer, named=True), status]


def _change(cell: Cell | None, *, named: bool = False) -> str:
    """From the checkpoint's metric to that at the end."""
    if cell is None:
        return OPEN
    dense, end = cell.stage("dense"), cell.stage("finetuned")
    metric = cell.ok[0]["metric"]
    assert dense is not None
    assert end is not None
    shown = [spread.text(percent=metric["percent"], digits=2 if metric["percent"] else 3) for spread in (dense, end)]
    which = f" ({cell.method})" if named else ""
    return f"{metric['name']} {shown[0].split(' ')[0]} to {shown[1]}{which}"


def _recipe(row: Row) -> str:
    if row.task is None:
        return f"{row.what}: {row.recipe}"
    return f"`python -m benchmarks contest {row.task} --scale paper --speed-ups {row.speed_up:g}`"


def norms(task: Task, out: Path) -> Path:
    """Norms of the widest group's units against their distance, before, within and after sparse training."""
    import matplotlib as mpl

    start = Start(task, checkpoint(task))
    with mpl.rc_context(plots.STYLE):
        figure, axes = plots.new_figure(columns=2)
        for ax, name in zip(axes, ("torque", "etp"), strict=True):
            method = library_method(name)
            assert method is not None
            _draw_norms(ax, task, start, method)
        axes[0].set_ylabel("norm of the unit")
        path = out / "images" / f"figure3-{task.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})
    return path


def _draw_norms(ax: Any, task: Task, start: Start, method: Method) -> None:
    """Train with the method's force at the push 1.5 and draw the norms in the order of the distances."""
    steps, model = task.recipe.sparse_steps, copy.deepcopy(start.dense)
    group, span = max(((g, s) for g, s in start.plan.spans() if g.locked is None), key=lambda pair: pair[0].n_units)
    tuned = replace(method, beta=1.5 * reference(task, model, start.plan, method))
    regularizer = tuned.regularizer(model, start.plan, steps=steps)
    assert regularizer is not None
    distance, order = regularizer.distances()[span].sort()
    units = Units(model, start.plan)

    def draw(step: int) -> None:
        if step in {0, steps // 4, steps // 2, steps}:
            norm = units.square_norms(model).detach().sqrt()[span][order]
            ax.plot(distance.tolist(), norm.tolist(), linewidth=0.9, label=f"step {step}")

    draw(0)
    train(
        task, model, steps=steps, peak=task.recipe.sparse_rate, seed=0, start=0, attach=regularizer.attach,
        after_step=draw,
    )  # fmt: skip
    ax.set_title(f"{method.name}: {group.name}, {group.n_units} units")
    ax.set_xlabel("distance from the pivot")
    ax.legend()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks reproduce", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=[*TABLES, "all", "figure3", "figure4"], help="all: the page of all tables")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder with the JSON lines")
    parser.add_argument("--out", type=Path, default=PAGES, help="folder of the figures")
    parser.add_argument("--task", choices=list(TASKS), default="cifar100", help="of figure3")
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="of figure3")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, for figure3")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    found = task_files(options.runs)
    if options.what in TABLES:
        sys.stdout.write(table(options.what, [record for file in found for record in read_records(file)]))
    elif options.what == "all":
        write_page([record for file in found for record in read_records(file)], options.out / "papers.md")
        console.print(f"wrote {options.out / 'papers.md'}", highlight=False)
    elif options.what == "figure3":
        torch.set_num_threads(options.threads)
        try:
            console.print(f"wrote {norms(make(options.task, options.scale), options.out)}")
        except TaskUnavailableError as error:
            parser.exit(2, f"{options.task}: {error}\n")
    else:
        (options.out / "images").mkdir(parents=True, exist_ok=True)
        for file in found:
            for scale, records in by_scale(read_records(file)).items():
                name = f"figure4-{file.stem}-{scale}"
                console.print(f"wrote {plots.plot_curves(records, options.out / 'images', name)}")
