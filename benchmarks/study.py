"""What makes ``etp`` what it is: variants of it, one thing different in each, on validation parts alone.

``python -m benchmarks.study cora ptb --seeds 1000 1001`` runs them (:mod:`benchmarks.variants`) as
:mod:`benchmarks.run` runs methods, but never reads a test part. One JSON line a run in
``benchmarks/results/study/TASK.jsonl``; ``--page`` writes ``docs/results/study.md`` from all of them and from what
its authors conclude (``benchmarks/results/study/remarks.md``).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .report import as_row, with_spread
from .run import configs, read, run_all
from .summary import Cell, Spread, cells
from .tasks import TaskUnavailableError
from .variants import QUESTIONS, STUDY

LINES, PAGE = Path("benchmarks/results/study"), Path("docs/results/study.md")
REMARKS = LINES / "remarks.md"
SPEED_UPS: Mapping[str, float] = {
    "cifar10": 5.0, "cora": 9.0, "tolokers": 9.0, "ptb": 5.0, "ett": 5.0, "sst2": 6.0,
    "cifar10-adamw": 5.0, "cora-scratch": 9.0, "ptb-scratch": 5.0,
}  # fmt: skip
CONTROLS = ("l1-uniform", "depgraph")


def page(found: Mapping[str, Sequence[dict[str, Any]]], remarks: str = "") -> str:
    """The page, a pure function of the records of each task and of what follows from them."""
    found = _by_speed_up(found)
    by_task = {task: {cell.method: cell for cell in cells(records)} for task, records in found.items()}
    names = ["etp", *STUDY, *CONTROLS]
    lines = [
        "# The study behind `etp`", "",
        "Each variant differs from `etp` in one thing. All figures are on *validation* parts; no test part was read. "
        "In each field: right after surgery / after fine-tuning, mean ± standard deviation over the seeds. The last "
        "column is the mean over the tasks of the relative loss against `etp`: positive means that the variant is "
        "worse.", "",
        "Made by `python -m benchmarks.study --page` from `benchmarks/results/study`; run by "
        + ", ".join(f"`{command}`" for command in _commands(found)) + ".", "",
    ]  # fmt: skip
    if remarks:
        lines += ["## What follows", "", remarks.strip(), ""]
    titles = [_title(records) for records in found.values()]
    for question in QUESTIONS:
        shown = [name for name in ("etp", *question.variants, *CONTROLS) if name in names]
        rows = {name: row for name in shown if (row := _row(name, by_task, found))}
        if rows.keys() & question.variants.keys():
            head = [as_row(("variant", *titles, "worse by")), "| --- |" + " ---: |" * (len(titles) + 1)]
            lines += [f"## {question.title}", "", *head, *rows.values(), ""]
    return "\n".join(lines)


def _commands(found: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    settings = []
    for records in found.values():
        seeds = " ".join(str(seed) for seed in sorted({record["config"]["seed"] for record in records}))
        first = records[0]["config"]
        settings.append(f"python -m benchmarks.study {first['task']} --speed-ups {first['speed_up']:g} --seeds {seeds}")
    return settings


def _by_speed_up(found: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The records of each task and speed-up: a column of the page."""
    columns: dict[str, list[dict[str, Any]]] = {}
    for task, records in found.items():
        for speed_up in sorted({record["config"]["speed_up"] for record in records}):
            own = [record for record in records if record["config"]["speed_up"] == speed_up]
            columns[f"{task} {speed_up:g}"] = own
    return columns


def _title(records: Sequence[dict[str, Any]]) -> str:
    first = records[0]
    return f"{first['title']}, {first['config']['speed_up']:g}x, {first['metric']['name']}"


def _row(
    name: str, by_task: Mapping[str, Mapping[str, Cell]], found: Mapping[str, Sequence[dict[str, Any]]]
) -> str | None:
    fields, losses = [], []
    for task, own in by_task.items():
        metric, cell = found[task][0]["metric"], own.get(name)
        if cell is None or not cell.ok:
            fields.append("failed" if cell is not None else "-")
            continue
        before, after = cell.stage("pruned", "val"), cell.stage("finetuned", "val")
        fields.append(f"{with_spread(before, metric)} / {with_spread(after, metric)}")
        if "etp" in own and (loss := _loss(after, own["etp"].stage("finetuned", "val"), higher=metric["higher"])):
            losses.append(loss)
    if all(field == "-" for field in fields):
        return None
    worse = f"{100 * statistics.fmean(losses):+.1f} %" if losses and name != "etp" else "-"
    return as_row((f"`{name}`", *fields, worse))


def _loss(own: Spread | None, base: Spread | None, *, higher: bool) -> float | None:
    if own is None or base is None:
        return None
    return (base.mean - own.mean) / base.mean * (1 if higher else -1)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tasks", nargs="*", choices=[*SPEED_UPS, []], help="default: none, with --page")
    parser.add_argument("--variants", nargs="+", default=["etp", *STUDY, *CONTROLS], metavar="NAME")
    parser.add_argument("--speed-ups", nargs="+", type=float, metavar="X", help=f"default {dict(SPEED_UPS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1000], metavar="N", help="default 1000")
    parser.add_argument("--page", action="store_true", help=f"write {PAGE}")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.variants) - {"etp", *STUDY, *CONTROLS})
    if unknown:
        parser.error(f"unknown variants {unknown}; known are etp, {', '.join(STUDY)}, {', '.join(CONTROLS)}")
    torch.set_num_threads(1)
    console = Console(stderr=True)
    for task in options.tasks:
        todo = configs(task, "cpu", options.variants, options.speed_ups or [SPEED_UPS[task]], options.seeds)
        try:
            run_all(todo, LINES / f"{task}.jsonl", console=console, blind=True)
        except TaskUnavailableError as error:
            parser.exit(2, f"{task}: {error}\n")
    if options.page:
        found = {path.stem: read(path) for path in sorted(LINES.glob("*.jsonl")) if path.stem in SPEED_UPS}
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        remarks = REMARKS.read_text(encoding="utf8") if REMARKS.is_file() else ""
        PAGE.write_text(page(found, remarks), encoding="utf8")
        console.print(f"wrote {PAGE}", highlight=False)


if __name__ == "__main__":
    main()
