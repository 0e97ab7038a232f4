"""Pages from the records of the runs, and from nothing else: ``python -m benchmarks.report``.

``docs/results/TASK.md`` for every file of runs, with figures, and ``docs/results/index.md``. What figures cannot say,
a file of Markdown beside the runs does (``TASK.md``): it goes onto the page as it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from .run import RUNS, files, read
from .summary import RIVALS, Cell, Record, Spread, cells, difference, impossible, rival
from .tasks.base import SMALL, concerns

PAGES = Path("docs/results")
COLUMNS = ("method", "before surgery", "right after", "fine-tuned", "params", "MACs", "p50 latency", "push", "seeds")


def page(records: Sequence[Record], *, figures: Sequence[str] = (), remarks: str = "") -> str:
    """The page of one task, a pure function of its records (of one scale) and of what its authors remark."""
    first = records[0]
    metric, config = first["metric"], first["config"]
    found = cells(records)
    lines = [f"# {first['title']}", "", *_introduction(records), ""]
    for speed_up in sorted({cell.speed_up for cell in found if cell.method != "dense"}):
        lines += [f"## {speed_up:g}x fewer multiply-adds", "", *_table(found, speed_up, metric), ""]
        lines += [*_impossible(found, speed_up), *_marks(found, speed_up, metric), ""]
    for name in figures:
        lines += [f"![{Path(name).stem.replace('-', ' ')}]({name})", ""]
    if remarks:
        lines += ["## Remarks", "", remarks.strip(), ""]
    lines += ["## How it was run", "", *_conditions(records, config), ""]
    return "\n".join(lines)


MORE = {"papers": "Beside the papers' tables", "study": "The study behind `etp`", "gradual": "Single weights or units"}
"""Pages that other commands make, by name."""


_OVERVIEW = (
    "*After fine-tuning, at the highest speed-up of each task, the best above; mean and standard deviation over the "
    "seeds. Hollow: controls; `dense`, dashed, is never cut and takes as many steps. Dotted: the checkpoint.*"
)


def index(pages: Mapping[str, Sequence[Record]], more: Iterable[str] = (), figure: str | None = None) -> str:
    """The list of all pages: what was measured, and how etp compares.

    Args:
        pages: records by the name of their page.
        more: names of further pages.
        figure: file of the overview.
    """
    lines = [
        "# Results", "",
        "Made by `python -m benchmarks.report` from the lines in `benchmarks/results/runs`; every page names its "
        "commands. *etp against ...* is the mean difference on the test part over the common seeds, in the units of "
        "the metric; better or worse means by more than one standard deviation of the difference.", "",
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
    return "\n".join([*lines, "", *(f"- [{MORE[name]}]({name}.md)" for name in more), ""])


def _introduction(records: Sequence[Record]) -> list[str]:
    metric = records[0]["metric"]
    better = "more is better" if metric["higher"] else "less is better"
    unit = ", in percent" if metric["percent"] else ""
    dense = Spread.of(list(dict.fromkeys(record["test"]["dense"] for record in records if record["status"] == "ok")))
    start = f" The checkpoint has {with_spread(dense, metric)}." if dense else ""
    return [
        f"{metric['name']}{unit} on the test part ({better}): before surgery (after sparse training), right after "
        f"surgery, and after fine-tuning; mean ± standard deviation over the seeds.{start} Params, MACs and p50 "
        "latency are dense over pruned. A dash: the method has no such stage. A starred push is the first or last of "
        "those tried.",
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
    own = next((cell for cell in found if cell.method == "etp" and cell.speed_up == speed_up and cell.ok), None)
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
    methods = " ".join(dict.fromkeys(record["config"]["method"] for record in records))
    speeds = sorted({record["config"]["speed_up"] for record in records if record["config"]["method"] != "dense"})
    seeds = sorted({record["config"]["seed"] for record in records})
    command = (
        f"python -m benchmarks.run {config['task']} --methods {methods} "
        f"--speed-ups {' '.join(f'{s:g}' for s in speeds)} "
        f"--seeds {' '.join(map(str, seeds))} --scale {config['scale']}"
    )
    counted = sorted({record["counted_by"] for record in records if record["status"] == "ok"})
    lines = [
        f"- `{command}`, {sum(record['seconds'] for record in records) / 60:.0f} minutes in all.",
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
    from .plots import plot_curves, plot_latency, plot_overview

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
    more = [name for name in MORE if (out / f"{name}.md").exists()]
    overview = plot_overview({n: r for n, r in pages.items() if r[0]["config"]["scale"] == "cpu"}, out / "images")
    figure = f"images/{overview}" if overview else None
    (out / "index.md").write_text(index(pages, more, figure), encoding="utf8")
    return [*written, out / "index.md"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder with the JSON lines")
    parser.add_argument("--out", type=Path, default=PAGES, help="folder of the pages")
    options = parser.parse_args()
    for path in write(options.runs, options.out):
        Console(stderr=True).print(f"wrote {path}", highlight=False)


if __name__ == "__main__":
    main()
