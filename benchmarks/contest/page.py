"""Write the records of measurements from committed results, without measuring: ``python -m benchmarks report``.

It writes ``docs/results/TASK.md`` with figures for every file of runs, the records on coverage, speed, latency, scale
and export from their JSON files, and ``docs/results/index.md``. Remarks that do not follow from figures are in a
Markdown file beside the runs (``TASK.md``) and are copied onto the page.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.statistics import RIVALS, Cell, Record, Spread, cells, difference, impossible, rival
from benchmarks.contest.run import RUNS, files, read
from benchmarks.tasks.base import SMALL, concerns

PAGES = Path("docs/results")
COLUMNS = ("method", "before surgery", "right after", "fine-tuned", "params", "MACs", "p50 latency", "push", "seeds")


def page(records: Sequence[Record], *, figures: Sequence[str] = (), remarks: str = "") -> str:
    """The page of one task, a pure function of its records (of one scale) and of what its authors remark."""
    first = records[0]
    metric, config = first["metric"], first["config"]
    found = cells(records)
    speed_ups = _speed_ups(found)
    lines = [f"# {first['title']}", "", *_introduction(records, found), ""]
    lines += ["## Findings", "", *_findings(records, found), "", "## Limits", "", *_limits(records, found), ""]
    if remarks:
        lines += ["## Remarks", "", remarks.strip(), ""]
    lines += ["## Terms", "", *_terms(metric), ""]
    for speed_up in speed_ups:
        lines += [f"## {speed_up:g}x fewer multiply-adds", "", *_table(found, speed_up, metric), ""]
        lines += [*_impossible(found, speed_up), *_marks(found, speed_up, metric), ""]
    for name in figures:
        lines += [f"![{Path(name).stem.replace('-', ' ')}]({name})", ""]
    lines += ["## How it was run", "", *_conditions(records, config), ""]
    return "\n".join(lines)


def _speed_ups(found: Sequence[Cell]) -> list[float]:
    return sorted({cell.speed_up for cell in found if cell.method != "dense"})


MORE = {
    "coverage": ("Coverage", "checks the plan of each model of the registry, beside plain Torch-Pruning"),
    "speed": ("Speed", "measures the cost of the force, of plans, of budgets and of surgery"),
    "latency": ("Latency", "compares the speed-up in multiply-adds with that in time, and checks budgets in time"),
    "scale": ("Scale", "measures what the force sends and costs on several ranks, and models it for up to 1,024 GPUs"),
    "export": ("Export", "exports pruned models with `torch.export`, `torch.compile` and ONNX"),
    "study": ("The study behind `etp`", "compares `etp` with variants of it that differ in one thing each"),
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
    lines = [
        "# Results", "",
        "This page lists the records of measurements. Each begins with its command, its findings and its limits; "
        "tables follow. [The protocol](../benchmarks.md) has the rules of the comparison.", "",
        "## Findings", "", *_verdicts(pages), "",
        "Better and worse mean by more than one standard deviation of the difference over the common seeds.", "",
        "## Limits", "", *_behind(pages),
        "- Tasks of the scale `cpu` have parts of the data, narrower networks and short schedules.",
        "- A task with a single seed gives no verdict.", "",
        "## Records", "",
        *(f"- [{MORE[name][0]}]({name}.md) {MORE[name][1]}." for name in more),
        *(f"- [{records[0]['title']}]({name}.md) {_contents(records)}." for name, records in pages.items()), "",
        "## Comparison on all tasks", "",
        "The table has the metric of `etp` on the test part and the mean difference to others over the common seeds, "
        "in the units of the metric. Write it again: `python -m benchmarks report`.", "",
        *([f"![All methods on every task]({figure})", "", _OVERVIEW, ""] if figure else []),
        as_row(("task", "metric", "speed-up", "etp", *(f"etp against {name}" for name in RIVALS), "seeds")),
        as_row(["---"] * (5 + len(RIVALS))),
    ]  # fmt: skip
    for name, records in pages.items():
        found, metric = cells(records), records[0]["metric"]
        for cell in sorted((c for c in found if c.method == "etp"), key=lambda c: c.speed_up):
            spread = cell.stage("finetuned")
            against = [_against(cell, found, other, metric) for other in RIVALS]
            lines.append(as_row((
                f"[{records[0]['title']}]({name}.md)", metric["name"], f"{cell.speed_up:g}x",
                with_spread(spread, metric), *against, str(spread.n if spread else 0),
            )))  # fmt: skip
    return "\n".join([*lines, ""])


def _verdicts(pages: Mapping[str, Sequence[Record]]) -> list[str]:
    """How often etp is better or worse than each rival, over tasks and speed-ups."""
    lines, own = [], _all_of_etp(pages)
    for name in RIVALS:
        said: Counter[str] = Counter()
        for cell, found, metric in own:
            said[_verdict(cell, found, name, higher=metric["higher"])] += 1
        counts = ", ".join(f"{sort} in {said[sort]}" for sort in ("better", "within one deviation", "worse"))
        rest = "".join(f"; {sort} in {n}" for sort, n in said.items() if sort not in _SAID)
        if own:
            lines.append(f"- Against {name}, of {len(own)} tasks and speed-ups: `etp` is {counts}{rest}.")
    return lines or ["- There are no runs yet."]


def _all_of_etp(pages: Mapping[str, Sequence[Record]]) -> list[tuple[Cell, list[Cell], Mapping[str, Any]]]:
    """The cells of etp, each with all cells of its task and the metric."""
    grouped = [(cells(records), records[0]["metric"]) for records in pages.values()]
    return [(cell, found, metric) for found, metric in grouped for cell in found if cell.method == "etp" and cell.ok]


def _behind(pages: Mapping[str, Sequence[Record]]) -> list[str]:
    """In how many tasks and speed-ups another method has a better mean than etp."""
    own = _all_of_etp(pages)
    n = sum(bool(_ahead(cell, found, higher=metric["higher"])) for cell, found, metric in own)
    return [
        f"- In {n} of {len(own)} tasks and speed-ups another method has a better mean than `etp`. "
        "The page of the task names it."
    ]


def _verdict(own: Cell, found: Sequence[Cell], name: str, *, higher: bool) -> str:
    other = rival(found, name, own.speed_up)
    if other is None:
        return "not possible" if impossible(found, name, own.speed_up) else "no such run yet"
    apart = difference(own, other, higher=higher)
    return "without verdict (one common seed or none)" if apart is None else apart.mark


def _contents(records: Sequence[Record]) -> str:
    """The sentence of a task in the list of records."""
    found = cells(records)
    methods = len({cell.method for cell in found})
    return f"compares {methods} methods by {records[0]['metric']['name']} at {_times(_speed_ups(found))}"


def _times(speed_ups: Sequence[float]) -> str:
    return " and ".join(f"{speed_up:g}x" for speed_up in speed_ups)


def _introduction(records: Sequence[Record], found: Sequence[Cell]) -> list[str]:
    methods, config = len({cell.method for cell in found}), records[0]["config"]
    return [
        f"This record compares {methods} methods at {_times(_speed_ups(found))} fewer multiply-adds. All see the same "
        "batches in the same order, so that they can be compared.", "",
        f"- Measure: `{_command(records, config)}`.",
        f"- Results: `benchmarks/results/runs/{config['task']}.jsonl`.",
        "- Write the page again without measuring: `python -m benchmarks report`.",
    ]  # fmt: skip


def _findings(records: Sequence[Record], found: Sequence[Cell]) -> list[str]:
    """Sentences that follow from the figures alone."""
    metric = records[0]["metric"]
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
    for speed_up in _speed_ups(found):
        own = _own(found, speed_up)
        if own is None:
            continue
        sorts: dict[str, list[str]] = {}
        for name, method in RIVALS.items():
            verdict = _verdict(own, found, name, higher=metric["higher"])
            if verdict in _SAID:
                sorts.setdefault(verdict, []).append(f"`{method}`")
        said = "; ".join(f"{_SAID[sort]} {', '.join(names)}" for sort in _SAID if (names := sorts.get(sort)))
        against = f" It is {said}." if said else ""
        lines.append(f"- At {speed_up:g}x `etp` has {with_spread(own.stage('finetuned'), metric)}.{against}")
        if not _ahead(own, found, higher=metric["higher"]):
            lines.append(f"- At {speed_up:g}x no other pruned or narrow network has a better mean than `etp`.")
    return lines


_SAID = {"better": "better than", "within one deviation": "within one deviation of", "worse": "worse than"}


def _own(found: Sequence[Cell], speed_up: float) -> Cell | None:
    return next((cell for cell in found if cell.method == "etp" and cell.speed_up == speed_up and cell.ok), None)


def _ahead(own: Cell, found: Sequence[Cell], *, higher: bool) -> list[Cell]:
    """The methods with a better mean at the same speed-up, the best first."""

    def mean(cell: Cell) -> float:
        spread = cell.stage("finetuned")
        return float("-inf") if spread is None else spread.mean * (1 if higher else -1)

    others = [cell for cell in found if cell.ok and cell.speed_up == own.speed_up and cell.method != "dense"]
    return sorted((cell for cell in others if mean(cell) > mean(own)), key=mean, reverse=True)


def _limits(records: Sequence[Record], found: Sequence[Cell]) -> list[str]:
    """What does not hold: who is ahead of etp, which methods gave nothing, and how much the figures say."""
    metric, lines = records[0]["metric"], []
    for speed_up in _speed_ups(found):
        own = _own(found, speed_up)
        ahead = [] if own is None else _ahead(own, found, higher=metric["higher"])
        if ahead:
            said = ", ".join(f"`{cell.method}` ({with_spread(cell.stage('finetuned'), metric)})" for cell in ahead)
            lines.append(f"- At {speed_up:g}x these have a better mean than `etp`: {said}.")
    failed = dict.fromkeys(f"`{cell.method}` at {cell.speed_up:g}x" for cell in found if not cell.ok)
    if failed:
        lines.append(f"- Without a result: {', '.join(failed)}. The reason is below the table.")
    seeds = [len(cell.ok) for cell in found if cell.method == "etp" and cell.ok]
    if seeds:
        few = "1 seed, which says nothing about chance" if max(seeds) == 1 else f"{min(seeds)} seeds"
        several = f"{min(seeds)} to {max(seeds)} seeds" if min(seeds) != max(seeds) else few
        lines.append(f"- The figures of `etp` come from {several}.")
    if records[0]["config"]["scale"] == "cpu":
        lines.append("- The scale is `cpu`: parts of the data, narrower networks and short schedules.")
    return lines


def _terms(metric: Mapping[str, Any]) -> list[str]:
    return [
        f"- *Before surgery* (after sparse training), *right after* surgery and *fine-tuned*: {metric['name']} on the "
        "test part, mean ± standard deviation over the seeds. A dash: the method has no such stage.",
        "- *Params*, *MACs* and *p50 latency*: of the dense network, divided by those of the pruned one.",
        "- *Better* and *worse*: by more than one standard deviation of the difference over the common seeds.",
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


def _marks(found: Sequence[Cell], speed_up: float, metric: Mapping[str, Any]) -> list[str]:
    own = _own(found, speed_up)
    if own is None:
        return []
    return [f"- etp against {name}: {_against(own, found, name, metric)}" for name in RIVALS]


def _against(own: Cell, found: Sequence[Cell], name: str, metric: Mapping[str, Any]) -> str:
    other = rival(found, name, own.speed_up)
    if other is None:
        return "not possible" if impossible(found, name, own.speed_up) else "no such run yet"
    apart = difference(own, other, higher=metric["higher"])
    by, digits = (100.0, 2) if metric["percent"] else (1.0, 3)
    if apart is None:
        left, right = own.by_seed(), other.by_seed()
        both = left.keys() & right.keys()
        return "; ".join(f"{by * (left[k] - right[k]):+.{digits}f}, a single seed" for k in both) or "no common seed"
    return f"{by * apart.mean:+.{digits}f} ± {by * apart.deviation:.{digits}f}, {apart.mark} ({apart.n} seeds)"


def _conditions(records: Sequence[Record], config: Mapping[str, Any]) -> list[str]:
    recipe = next((r for r in records if r["config"]["method"] == SMALL), records[0])["recipe"]
    counted = sorted({record["counted_by"] for record in records if record["status"] == "ok"})
    lines = [
        f"- {sum(record['seconds'] for record in records) / 60:.0f} minutes in all.",
        f"- Checkpoint: {records[0]['checkpoint']}. Seeds vary the order of the data and all that is random in a "
        f"method{'' if 'seed of the run' in records[0]['checkpoint'] else ', not the checkpoint'}.",
        f"- Every method: {recipe['sparse_steps']} + {recipe['finetune_steps']} steps of {recipe['batch_size']} "
        f"examples in the same order, {recipe['optimizer']}, learning rates up to {recipe['sparse_rate']:g} and "
        f"{recipe['finetune_rate']:g}; methods without a force take all of them after surgery. *small-dense* trains "
        f"{recipe['scratch_steps']} steps from fresh weights, at the best of several learning rates, which stand under "
        "push as multiples of the checkpoint's; *dense* is never cut.",
        f"- Strengths: the best of the pushes {', '.join(f'{p:g}' for p in recipe['pushes'])} on the validation part, "
        f"each with {100 * recipe['tune_share']:.0f} % of the steps (`benchmarks/strength.py`).",
        f"- MACs by {' and '.join(counted) or '-'}; latency is the median over forwards of dense and pruned in turns.",
    ]
    if any(concerns(r["recipe"], r["config"]["method"]) != concerns(recipe, r["config"]["method"]) for r in records):
        lines.append("- **The records come from more than one recipe**; the steps above are those of the first.")
    for name in records[0]["conditions"]:
        values = dict.fromkeys(record["conditions"].get(name, "-") for record in records)
        lines.append(f"- {name}: {', '.join(values)}")
    return [*lines, f"- commit: {', '.join(dict.fromkeys(record['commit'] for record in records))}"]


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
    return f"**{method}**" if method == "etp" else method


def with_spread(spread: Spread | None, metric: Mapping[str, Any]) -> str:
    return "-" if spread is None else spread.text(percent=metric["percent"], digits=2 if metric["percent"] else 3)


def _ratio(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.mean:.2f}x"


def as_row(values: Iterable[str]) -> str:
    return "| " + " | ".join(str(value).replace("|", "/") for value in values) + " |"


def by_scale(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each scale, apart: they are not comparable."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["config"]["scale"], []).append(record)
    return found


def write(runs: Path, out: Path) -> list[Path]:
    """Write all pages and figures; what was written."""
    from benchmarks.common.figures import plot_curves, plot_latency, plot_overview

    pages: dict[str, list[Record]] = {}
    remarks = {path.stem: path.read_text(encoding="utf8") for path in runs.glob("*.md")}
    for file in files(runs):
        for scale, records in by_scale(read(file)).items():
            pages[file.stem if scale == "cpu" else f"{file.stem}-{scale}"] = records
    (out / "images").mkdir(parents=True, exist_ok=True)
    written = []
    for name, records in pages.items():
        figures = [plot(records, out / "images", name) for plot in (plot_curves, plot_latency)]
        path = out / f"{name}.md"
        shown = [f"images/{figure}" for figure in figures if figure]
        path.write_text(page(records, figures=shown, remarks=remarks.get(name, "")), encoding="utf8")
        written.append(path)
    written += measured(runs.parent, out)
    more = [name for name in MORE if (out / f"{name}.md").exists()]
    overview = plot_overview({n: r for n, r in pages.items() if r[0]["config"]["scale"] == "cpu"}, out / "images")
    figure = f"images/{overview}" if overview else None
    (out / "index.md").write_text(index(pages, more, figure), encoding="utf8")
    return [*written, out / "index.md"]


def measured(results: Path, out: Path) -> list[Path]:
    """Write the records on coverage, speed, latency, scale and export whose results are there."""
    from benchmarks.coverage import page as coverage_page
    from benchmarks.export import page as export_page
    from benchmarks.latency import page as latency_page
    from benchmarks.models import registry
    from benchmarks.scale import run as scale
    from benchmarks.speed import page as speed_page

    pages = {
        "coverage": ("coverage", coverage_page.write_page), "speed": ("speed-cpu", speed_page.write_page),
        "latency": ("latency-cpu", latency_page.write_page), "export": ("export", export_page.write_page),
        "scale": ("scale", lambda body, path: path.write_text(scale.page(body), encoding="utf8")),
    }  # fmt: skip
    written = []
    for name, (file, write_page) in pages.items():
        path = results / f"{file}.json"
        if not path.is_file():
            continue
        body = json.loads(path.read_text(encoding="utf8"))
        if name in ("coverage", "export"):
            missing = {key.partition("/")[0] for key in body["measurements"]} - registry().keys()
            if missing:  # a page without them would look complete
                lost = ", ".join(sorted(missing))
                Console(stderr=True).print(f"{name}.md is left as it is: no library for {lost}", highlight=False)
                continue
        write_page(body, out / f"{name}.md")
        written.append(out / f"{name}.md")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder with the JSON lines")
    parser.add_argument("--out", type=Path, default=PAGES, help="folder of the pages")
    options = parser.parse_args()
    for path in write(options.runs, options.out):
        Console(stderr=True).print(f"wrote {path}", highlight=False)


if __name__ == "__main__":
    main()
