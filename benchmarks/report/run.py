"""Write the records of measurements from committed results, without measuring: ``python -m benchmarks report``.

It writes ``docs/results/TASK.md`` with figures for every file of runs, the records on coverage, speed, latency, scale
and export from their JSON files, and the pages on all tasks: ``evidence.md``, ``archive.md`` and ``index.md``. Remarks
that do not follow from figures are in a Markdown file beside the runs (``TASK.md``) and are copied onto the page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.common.figures import plot_curves, plot_latency, plot_overview
from benchmarks.common.records import PAGES, RUNS, Record, by_scale, read_records, task_files
from benchmarks.contest.gate import GATED, refusal, under_newest_recipe
from benchmarks.contest.page import page
from benchmarks.coverage import page as coverage_page
from benchmarks.export import page as export_page
from benchmarks.graph_sources import page as graph_sources_page
from benchmarks.latency import page as latency_page
from benchmarks.models import registry
from benchmarks.report.contrasts import effects
from benchmarks.report.contrasts import plot as plot_contrasts
from benchmarks.report.evidence import evidence
from benchmarks.report.index import MORE, archive, index
from benchmarks.scale import page as scale_page
from benchmarks.speed import page as speed_page

EVIDENCE = "evidence.md"
"""What follows from the runs at full size, in words; beside the runs."""


def write(runs: Path, out: Path) -> list[Path]:
    """Write all pages and figures; what was written."""
    pages: dict[str, list[Record]] = {}
    remarks = {path.stem: path.read_text(encoding="utf8") for path in runs.glob("*.md")}
    for file in task_files(runs):
        for scale, records in by_scale(read_records(file)).items():
            pages[file.stem if scale == "cpu" else f"{file.stem}-{scale}"] = under_newest_recipe(records)
    (out / "images").mkdir(parents=True, exist_ok=True)
    written = []
    refused = {name for name, records in pages.items() if refusal(records, records[0]["recipe"]) is not None}
    for name, records in pages.items():
        plots = () if name in refused else (plot_curves, plot_latency)
        figures = [plot(records, out / "images", name) for plot in plots]
        path = out / f"{name}.md"
        shown = [f"images/{figure}" for figure in figures if figure]
        path.write_text(page(records, figures=shown, remarks=remarks.get(name, "")), encoding="utf8")
        written.append(path)
    written += measured(runs.parent, out)
    return [*written, *_summaries({name: own for name, own in pages.items() if name not in refused}, runs, out)]


def _summaries(pages: Mapping[str, Sequence[Record]], runs: Path, out: Path) -> list[Path]:
    """Write the pages on all tasks, and the figures in them."""
    full = {name: records for name, records in pages.items() if records[0]["config"]["scale"] in GATED}
    short = {name: records for name, records in pages.items() if name not in full}
    remarks = runs / EVIDENCE
    drawn = [plot_contrasts(effects(full), out / "images"), plot_overview(short, out / "images")]
    contrasts, overview = (None if figure is None else f"images/{figure}" for figure in drawn)
    text = {
        "evidence": evidence(full, remarks=remarks.read_text("utf8") if remarks.exists() else "", figure=contrasts),
        "archive": archive(short, overview),
        "index": index(full, [name for name in MORE if (out / f"{name}.md").exists()]),
    }
    for name, page_text in text.items():
        (out / f"{name}.md").write_text(page_text, encoding="utf8")
    return [out / f"{name}.md" for name in text]


def measured(results: Path, out: Path) -> list[Path]:
    """Write the records on coverage, speed, latency, scale and export whose results are there."""
    pages = {
        "coverage": ("coverage", coverage_page.write_page), "speed": ("speed-cpu", speed_page.write_page),
        "latency": ("latency-cpu", latency_page.write_page), "export": ("export", export_page.write_page),
        "graph-sources": ("graph-sources", graph_sources_page.write_page),
        "scale": ("scale", lambda body, path: path.write_text(scale_page.page(body), encoding="utf8")),
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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder with the JSON lines")
    parser.add_argument("--out", type=Path, default=PAGES, help="folder of the pages")
    options = parser.parse_args(arguments)
    for path in write(options.runs, options.out):
        Console(stderr=True).print(f"wrote {path}", highlight=False)
