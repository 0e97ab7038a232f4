"""What makes ``etp`` what it is: variants of it, one thing different in each, on validation parts alone.

On short schedules the method that is varied is ``etp-global``, what ``etp`` was when they were run.

``python -m benchmarks study cora ptb --seeds 1000 1001`` runs them (:mod:`benchmarks.contest.variants`) as
:mod:`benchmarks.contest.run` runs methods, but never reads a test part. One JSON line a run in
``benchmarks/results/study/TASK.jsonl``, or ``TASK-full.jsonl`` with ``--scale full``. ``--page`` writes
``docs/results/study.md`` and ``study-tables.md``, and for full size ``study-full.md`` and ``study-full-tables.md``,
from all lines and from what its authors conclude (``benchmarks/results/study/remarks.md`` and ``remarks-full.md``).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.common.markdown import as_row, with_spread
from benchmarks.common.records import PAGES, read_records
from benchmarks.common.statistics import Cell, Spread, cells
from benchmarks.contest.run import configs, run_all
from benchmarks.contest.variants import ETP, GLOBAL, STUDY, Question, questions
from benchmarks.tasks import TaskUnavailableError
from etp_graph.methods import Method

LINES = Path("benchmarks/results/study")
SPEED_UPS: Mapping[str, float] = {
    "cifar10": 5.0, "cifar10-resnet56": 2.93, "cora": 9.0, "tolokers": 9.0, "ptb": 5.0, "ett": 5.0, "sst2": 6.0,
    "mrpc": 8.0, "cifar100": 9.0, "flickr8k": 1.25, "cifar10-adamw": 5.0, "cora-scratch": 9.0, "ptb-scratch": 5.0,
}  # fmt: skip
CONTROLS = ("l1-uniform", "depgraph", "l1-gradual", "taylor-gradual", "oneshot")


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """The study on schedules of one length.

    Attributes:
        scale: of the tasks.
        base: the method that is varied.
        title: of the page.
        stem: of the pages; the lines of a task have the same suffix.
        what: a sentence on the length.
    """

    scale: str
    base: Method
    title: str
    stem: str
    what: str

    @property
    def questions(self) -> tuple[Question, ...]:
        """What is varied."""
        return questions(self.base)

    @property
    def page(self) -> Path:
        """The summary."""
        return PAGES / f"{self.stem}.md"

    @property
    def figures(self) -> Path:
        """The page of all figures."""
        return PAGES / f"{self.stem}-tables.md"

    @property
    def remarks(self) -> Path:
        """What its authors conclude."""
        return LINES / ("remarks.md" if self.scale == "cpu" else f"remarks-{self.scale}.md")

    def lines(self, task: str) -> Path:
        """The lines of a task."""
        return LINES / (f"{task}.jsonl" if self.scale == "cpu" else f"{task}-{self.scale}.jsonl")

    def found(self) -> dict[str, list[dict[str, Any]]]:
        """All lines, by task."""
        return {task: records for task in sorted(SPEED_UPS) if (records := read_records(self.lines(task)))}


LENGTHS = {
    length.scale: length
    for length in (
        Length(
            scale="cpu", base=GLOBAL, title="The study behind `etp`, on short schedules", stem="study",
            what="`etp-global` compares scores across groups. It is what `etp` was when this study was made; `etp` now "
            "takes the same share of every group, as its variant `etp-global[local]` does. Schedules are short; [the "
            "evidence](evidence.md) has runs at full size.",
        ),
        Length(
            scale="full", base=ETP, title="The study of `etp` at full size", stem="study-full",
            what="Recipes are those of [the evidence](evidence.md): whole data sets, and training that keeps the dense "
            "network's accuracy.",
        ),
    )
}  # fmt: skip
"""By the scale of their tasks."""


def page(found: Mapping[str, Sequence[dict[str, Any]]], remarks: str = "", length: Length = LENGTHS["full"]) -> str:
    """The summary, a pure function of the records of each task and of what follows from them."""
    found, base = _by_speed_up(found), length.base.name
    by_task = _by_task(found)
    seeds = [len({record["config"]["seed"] for record in records}) for records in found.values()]
    lines = [
        f"# {length.title}", "",
        f"This record compares `{base}` with variants of it that differ in one thing each, to find which parts of the "
        f"method matter. Settings, each a task at a speed-up: {len(found)}. All figures are on *validation* "
        f"parts; no test part was read. {length.what} [The second page]({length.figures.name}) has every figure and "
        "the commands.", "",
        "- Measure: `python -m benchmarks study TASK --speed-ups X --seeds N`.",
        "- Results: `benchmarks/results/study`.",
        "- Write the pages again without measuring: `python -m benchmarks study --page`.",
        "", "## Findings", "",
        f"The figure of a variant is its relative loss against `{base}` after fine-tuning, the mean over its settings. "
        f"Positive means worse than `{base}`.", "",
        *_findings(by_task, found, length), "",
        "## Limits", "",
        f"- Seeds for each setting: {' to '.join(map(str, sorted({min(seeds), max(seeds)})))}. "
        "Small differences may be chance.",
        "- Not every variant was run in every setting. Means over different settings cannot be compared exactly.",
        f"- A setting in which a variant has exactly the figure of `{base}` counts as 0 % in its mean.", "",
        "## Variants", "",
        as_row(("question", "variant", "settings in the mean", "worse by")), "| --- | --- | ---: | ---: |",
        *(as_row((title, f"`{name}`", str(len(losses)), _percent(losses)))
          for title, name, losses in _worse(by_task, found, length)), "",
    ]  # fmt: skip
    return "\n".join([*lines, *(["## What follows", "", remarks.strip(), ""] if remarks else [])])


def tables(found: Mapping[str, Sequence[dict[str, Any]]], length: Length = LENGTHS["full"]) -> str:
    """All figures, a table for each question, and the commands."""
    found, base = _by_speed_up(found), length.base.name
    by_task = _by_task(found)
    lines = [
        f"# {length.title}, all figures", "",
        f"This page lists every figure of [the study]({length.page.name}). In each field: right after surgery / after "
        "fine-tuning, on the validation part, mean ± standard deviation over the seeds. *Worse by*: the mean over the "
        f"settings of the relative loss against `{base}`.", "",
    ]  # fmt: skip
    titles = [_title(records) for records in found.values()]
    for question in length.questions:
        shown = (base, *question.variants, *CONTROLS)
        rows = {name: row for name in shown if (row := _row(name, by_task, found, base))}
        if rows.keys() & question.variants.keys():
            head = [as_row(("variant", *titles, "worse by")), "| --- |" + " ---: |" * (len(titles) + 1)]
            lines += [f"## {question.title}", "", *head, *rows.values(), ""]
    return "\n".join([*lines, "## Commands", "", *(f"- `{command}`" for command in _commands(found)), ""])


def _by_task(found: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, dict[str, Cell]]:
    return {task: {cell.method: cell for cell in cells(records)} for task, records in found.items()}


def _worse(
    by_task: Mapping[str, Mapping[str, Cell]], found: Mapping[str, Sequence[dict[str, Any]]], length: Length
) -> list[tuple[str, str, list[float]]]:
    """Question, variant and its losses, of all that were run; the controls at the end."""
    asked = [(question.title, name) for question in length.questions for name in question.variants]
    asked += [("control", name) for name in CONTROLS]
    return [(title, name, own) for title, name in asked if (own := _losses(name, by_task, found, length.base.name))]


def _findings(
    by_task: Mapping[str, Mapping[str, Cell]], found: Mapping[str, Sequence[dict[str, Any]]], length: Length
) -> list[str]:
    """The worst variant of each question, and how many are worse at all."""
    rows, base = _worse(by_task, found, length), length.base.name
    variants = [losses for title, _, losses in rows if title != "control"]
    if not variants:
        return ["- No variant was run."]
    worse = sum(statistics.fmean(losses) > 0 for losses in variants)
    lines = [f"- {worse} of {len(variants)} variants are worse than `{base}` on the mean of their settings."]
    for question in length.questions:
        own = [(statistics.fmean(losses), name, losses) for title, name, losses in rows if title == question.title]
        if own:
            _, name, losses = max(own)
            lines.append(f"- {question.title}: `{name}` has the largest loss, {_percent(losses)}.")
    said = ", ".join(f"`{name}` {_percent(losses)}" for title, name, losses in rows if title == "control")
    return [*lines, *([f"- The controls: {said}."] if said else [])]


def _percent(losses: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(losses):+.1f} %"


def _commands(found: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    settings = []
    for records in found.values():
        seeds = " ".join(str(seed) for seed in sorted({record["config"]["seed"] for record in records}))
        first = records[0]["config"]
        scale = "" if first["scale"] == "cpu" else f" --scale {first['scale']}"
        speed_up = f"--speed-ups {first['speed_up']:g}"
        settings.append(f"python -m benchmarks study {first['task']}{scale} {speed_up} --seeds {seeds}")
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
    name: str, by_task: Mapping[str, Mapping[str, Cell]], found: Mapping[str, Sequence[dict[str, Any]]], base: str
) -> str | None:
    fields = []
    for task, own in by_task.items():
        metric, cell = found[task][0]["metric"], own.get(name)
        if cell is None or not cell.ok:
            fields.append("failed" if cell is not None else "-")
            continue
        before, after = cell.stage("pruned", "val"), cell.stage("finetuned", "val")
        fields.append(f"{with_spread(before, metric)} / {with_spread(after, metric)}")
    if all(field == "-" for field in fields):
        return None
    losses = _losses(name, by_task, found, base)
    return as_row((f"`{name}`", *fields, _percent(losses) if losses and name != base else "-"))


def _losses(
    name: str, by_task: Mapping[str, Mapping[str, Cell]], found: Mapping[str, Sequence[dict[str, Any]]], base: str
) -> list[float]:
    """Return the relative losses against the base in the settings that both have; 0 if the figures are equal."""
    losses = []
    for task, own in by_task.items():
        higher, cell = found[task][0]["metric"]["higher"], own.get(name)
        if cell is None or not cell.ok or base not in own:
            continue
        reference = own[base].stage("finetuned", "val")
        loss = _loss(cell.stage("finetuned", "val"), reference, higher=higher)
        if loss is not None:
            losses.append(loss)
    return losses


def _loss(own: Spread | None, base: Spread | None, *, higher: bool) -> float | None:
    if own is None or base is None:
        return None
    return (base.mean - own.mean) / base.mean * (1 if higher else -1)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks study", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tasks", nargs="*", choices=[*SPEED_UPS, []], help="default: none, with --page")
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        help="default: all of the method that the page of the scale varies, and the controls",
    )
    parser.add_argument("--speed-ups", nargs="+", type=float, metavar="X", help=f"default {dict(SPEED_UPS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1000], metavar="N", help="default 1000")
    parser.add_argument("--scale", choices=list(LENGTHS), default="cpu", help="default cpu")
    parser.add_argument("--page", action="store_true", help="write the pages of all lines")
    options = parser.parse_args(arguments)
    known = (ETP.name, GLOBAL.name, *STUDY, *CONTROLS)
    length = LENGTHS[options.scale]
    own = [name for question in length.questions for name in question.variants]
    variants = options.variants or [length.base.name, *own, *CONTROLS]
    if unknown := sorted(set(variants) - {*known}):
        parser.error(f"unknown variants {unknown}; known are {', '.join(known)}")
    torch.set_num_threads(1)
    console = Console(stderr=True)
    for task in options.tasks:
        todo = configs(task, options.scale, variants, options.speed_ups or [SPEED_UPS[task]], options.seeds)
        try:
            run_all(todo, length.lines(task), console=console, blind=True)
        except TaskUnavailableError as error:
            parser.exit(2, f"{task}: {error}\n")
    if options.page:
        for path in write_pages():
            console.print(f"wrote {path}", highlight=False)


def write_pages() -> list[Path]:
    """Write the pages of every length that has lines; what was written."""
    written = []
    for length in LENGTHS.values():
        found = length.found()
        if found:
            remarks = length.remarks.read_text(encoding="utf8") if length.remarks.is_file() else ""
            length.page.parent.mkdir(parents=True, exist_ok=True)
            length.page.write_text(page(found, remarks, length), encoding="utf8")
            length.figures.write_text(tables(found, length), encoding="utf8")
            written += [length.page, length.figures]
    return written
