"""The pages of the comparison: functions of the lines that the runs wrote."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import figures as plots
from benchmarks.common import statistics as summary
from benchmarks.common.contestant_names import RIVALS, STRONGEST
from benchmarks.common.records import by_scale, read_records, task_files
from benchmarks.contest import contestants
from benchmarks.contest import page as task_page
from benchmarks.contest.variants import ETP, GLOBAL, STUDY
from benchmarks.contest.verdicts import rival
from benchmarks.papers import reproduce
from benchmarks.report import run as report
from benchmarks.report.contrasts import effects
from benchmarks.report.evidence import evidence
from benchmarks.report.index import archive, index
from benchmarks.serving import page as serving_page
from benchmarks.study import run as study
from benchmarks.weights_or_units import page as gradual_page
from tests.support.models.benchmark_toy import RECIPE, fields_of

ROOT = Path(__file__).parents[2]
RUNS, PAGES = ROOT / "benchmarks" / "results" / "runs", ROOT / "docs" / "results"


def line(method: str, seed: int, value: float, *, speed_up: float = 2.0, status: str = "ok") -> dict[str, Any]:
    body: dict[str, Any] = {
        "format": 1, "config": {"task": "toy", "scale": "cpu", "method": method, "speed_up": speed_up, "seed": seed},
        "title": "a toy", "metric": {"name": "accuracy", "higher": True, "percent": True}, "status": status,
        "recipe": fields_of(RECIPE), "checkpoint": "given", "conditions": {"torch": "2"},
        "commit": "abc", "seconds": 6.0,
    }  # fmt: skip
    if status != "ok":
        return {**body, "reason": "it cannot"}
    return {
        **body, "test": {"dense": 0.9, "pruned": value / 2, "finetuned": value}, "macs": [100, 50],
        "params": [10, 4], "latency": [3.0, 2.0], "push": 0.5, "trials": [{"push": 0.5}, {"push": 2.0}],
        "counted_by": "hand",
    }  # fmt: skip


def lines() -> list[dict[str, Any]]:
    return [
        *(line("etp", seed, value) for seed, value in enumerate((0.80, 0.82, 0.84))),
        *(line("torque", seed, value) for seed, value in enumerate((0.70, 0.71, 0.72))),
        *(line("tp-groupnorm", seed, value) for seed, value in enumerate((0.79, 0.82, 0.85))),
        line("tp-growing", 0, 0, status="not possible"),
    ]  # fmt: skip


def test_page_is_a_function_of_the_lines() -> None:
    text = task_page.page(lines())
    assert text == task_page.page(json.loads(json.dumps(lines())))
    # stdev(80, 82, 84) = 2, stdev(70, 71, 72) = 1; etp - torque = 10, 11, 12; etp - tp-groupnorm = 1, 0, -1; both have
    # the deviation 1, and with two degrees of freedom the interval is 4.303 / sqrt(3) = 2.48 on each side.
    assert "| **etp** | - | 41.00 ± 1.00 | 82.00 ± 2.00 | 2.50x | 2.00x | 1.50x | 0.5* | 3 |" in text
    assert "| torque | - | 35.50 ± 0.50 | 71.00 ± 1.00 |" in text
    assert "etp against Torque: +11.00 [+8.52, +13.48], better: `torque`" in text
    assert "etp against DepGraph: +0.00 [-2.48, +2.48], not significant: `tp-groupnorm`" in text
    assert "- tp-growing: not possible. it cannot" in text
    assert "--methods etp torque tp-groupnorm tp-growing --speed-ups 2 --seeds 0 1 2 --scale cpu" in text


def test_a_page_begins_with_its_findings_and_limits() -> None:
    text = task_page.page(lines())
    head, _, tables = text.partition("## Terms")
    assert "|" not in head
    assert (
        "- At 2x `etp` has 82.00 ± 2.00. It is better than `torque`; not significantly different from `tp-groupnorm`."
        in head
    )
    assert "- At 2x no other pruned or narrow network has a better mean than `etp`." in head
    assert "- At 2x these have a better mean than `etp`: `whc` (90.00)." in task_page.page(
        [*lines(), line("whc", 0, 0.9)]
    )
    assert "- Without a result: `tp-growing` at 2x." in head
    assert "- The figures of `etp` come from 3 seeds." in head
    assert "| **etp** |" in tables


def judged(method: str, value: float, *, rate: float = 0.02, status: str = "ok") -> dict[str, Any]:
    """A line at the scale whose recipes are judged."""
    body = line(method, 0, value, status=status, speed_up=1.0 if method == "dense" else 2.0)
    return {
        **body, "config": {**body["config"], "scale": "full"}, "recipe": {**body["recipe"], "sparse_rate": rate},
        "val": {"dense": 0.9, "finetuned": value},
    }  # fmt: skip


def test_a_refused_recipe_has_a_page_without_tables(tmp_path: Path) -> None:
    refused = [judged("dense", 0.89, status="refused"), judged("etp", 0.8)]
    text = task_page.page(refused)
    assert "refused, so this page has no tables" in text
    assert "it loses 1.00 points, 0.3 points are allowed" in text
    assert "|" not in text
    assert "80.00" not in text
    runs, out = tmp_path / "runs", tmp_path / "pages"
    runs.mkdir()
    (runs / "toy.jsonl").write_text("\n".join(map(json.dumps, refused)))
    report.write(runs, out)
    for name in ("index", "evidence", "archive"):
        assert "](toy-full.md)" not in (out / f"{name}.md").read_text()
    assert (out / "toy-full.md").read_text() == text


def test_a_page_of_whole_data_shows_the_newest_recipe_alone() -> None:
    older = [judged("dense", 0.89, status="refused"), judged("etp", 0.7), judged("torque", 0.6)]
    newer = [judged("dense", 0.9, rate=0.01), judged("etp", 0.8, rate=0.01)]
    text = task_page.page([*older, *newer])
    assert "| **etp** | - | 40.00 | 80.00 |" in text
    assert "torque |" not in text


def test_a_page_counts_the_trials_once_for_all_seeds() -> None:
    trials = [{"push": 0.5, "value": 0.8, "seconds": 3600.0}, {"push": 2.0, "value": 0.7, "seconds": 1800.0}]
    records = [{**line("torque", seed, 0.8), "trials": trials} for seed in (0, 1)]
    assert "and 1.5 hours of tuning: `torque` 2 trials in 1.5 hours." in task_page.page(records)
    assert "hours of tuning" not in task_page.page(lines())
    at_once = [
        {**line("torque", 0, 0.8, speed_up=x), "trials": trials, "recipe": {**fields_of(RECIPE), "tuned_at": 3.0}}
        for x in (2.0, 4.0)
    ]  # fmt: skip
    assert "and 1.5 hours of tuning: `torque` 2 trials" in task_page.page(at_once)  # one tuning for both speed-ups


def test_a_page_says_that_its_runs_differ_in_precision() -> None:
    records = [{**line("torque", seed, 0.8), "precision": name} for seed, name in enumerate(("bf16", "fp32"))]
    assert "more than one precision of training**: bf16, fp32." in task_page.page(records)
    assert "precision of training" not in task_page.page(lines())


def full(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**one, "config": {**one["config"], "scale": "full"}} for one in records]


def control(lost: float) -> dict[str, Any]:
    body = line("dense", 0, 0.9, speed_up=1.0)
    return {**body, "val": {"dense": 0.9, "finetuned": 0.9 - lost}}


def test_the_evidence_counts_verdicts() -> None:
    text = evidence({"toy-full": full(lines())})
    rows = {name: next(r for r in text.splitlines() if r.startswith(f"- Against {name},")) for name in RIVALS}
    assert rows["Torque"].endswith("`etp` is better in 1, not significant in 0, worse in 0.")
    assert rows["DepGraph"].endswith("`etp` is better in 0, not significant in 1, worse in 0.")
    assert rows["Taylor"].endswith("worse in 0; no such run yet in 1.")
    assert "the unpruned network" in text and "0.0 hours of one thread" in text


def test_the_index_lists_all_records() -> None:
    text = index({"toy": lines()}, ["study"])
    assert "- [The study on short schedules](study.md) compares" in text
    assert "- [a toy](toy.md) compares 4 methods by accuracy at 2x." in text
    assert text.index("(evidence.md)") < text.index("(study.md)") < text.index("(archive.md)")


def test_only_full_size_gives_evidence_and_a_control_that_loses_is_named(tmp_path: Path) -> None:
    old = archive({"toy": [*lines(), control(0.02)], "other": [*lines(), control(-0.01)]})
    assert "In 1 of 2 tasks the unpruned control loses more than 0.3 points" in old
    assert "of 2 tasks and speed-ups" in old and "| -2.00 |" in old and "| +1.00 |" in old
    assert "| -0.10 |" in evidence({"toy-full": full([*lines(), control(0.001)])})
    runs = tmp_path / "runs"
    runs.mkdir()
    both = [*lines(), *full([*lines()[:2], control(0.001)])]
    (runs / "toy.jsonl").write_text("\n".join(map(json.dumps, both)))
    report.write(runs, tmp_path / "out")
    new, old = ((tmp_path / "out" / f"{name}.md").read_text() for name in ("evidence", "archive"))
    assert "(toy-full.md)" in new and "(toy.md)" not in new and "(toy.md)" in old and "(toy-full.md)" not in old
    assert "Fewer than three seeds: a toy." in new


def test_a_rival_is_chosen_by_validation_and_not_by_the_test_part() -> None:
    def both(method: str, seed: int, val: float, test: float) -> dict[str, Any]:
        return {**line(method, seed, test), "val": {"finetuned": val}}

    records = [
        *(both("etp", seed, 0.8, 0.8) for seed in range(3)), *(both("l1-uniform", seed, 0.7, 0.9) for seed in range(3)),
        *(both("l1-gradual", seed, 0.75, 0.6) for seed in range(3)), both("taylor", 0, 0.99, 0.5),
        *(both("l1-gradual+kd", seed, 0.9, 0.9) for seed in range(3)),
    ]  # fmt: skip
    own, *_ = found = summary.cells(records)
    for name in ("L1", STRONGEST):  # a single seed and a network with a teacher are no better rivals
        other = rival(own, found, name, higher=True)
        assert other is not None and other.method == "l1-gradual"
    assert rival(own, found, "Taylor", higher=True).method == "taylor"  # type: ignore[union-attr]


def test_contrasts_take_one_thing_at_a_time_and_turn_metrics_the_right_way() -> None:
    runs = [
        *(line("etp", seed, 0.80 + 0.01 * seed) for seed in range(3)),
        *(line("etp-hard", seed, 0.70 + 0.01 * seed) for seed in range(3)),
    ]  # fmt: skip
    higher = effects({"toy": runs})
    assert [(one.contrast.part, one.stage) for one in higher] == [("the force", "pruned"), ("the force", "finetuned")]
    assert higher[1].gain.mean == pytest.approx(10.0) and higher[1].gain.mark == "better"
    lower = [{**one, "metric": {"name": "MSE", "higher": False, "percent": False}} for one in runs]
    found = effects({"toy": lower})[1].gain
    assert found.mark == "worse"
    assert found.mean == pytest.approx(-100 * sum(0.1 / (0.7 + 0.01 * s) for s in range(3)) / 3)


def test_committed_runs_are_found() -> None:
    assert {"cifar10", "ptb"} <= {file.stem for file in task_files(RUNS)}


@pytest.mark.parametrize("file", task_files(RUNS), ids=lambda file: file.stem)
def test_committed_runs_give_the_committed_page(file: Path) -> None:
    for scale, records in by_scale(read_records(file)).items():
        name = file.stem if scale == "cpu" else f"{file.stem}-{scale}"
        remarks = file.with_name(f"{name}.md")
        found = [f"images/{name}-{kind}.png" for kind in ("curve", "latency")]
        shown = [figure for figure in found if (PAGES / figure).exists()]
        text = task_page.page(records, figures=shown, remarks=remarks.read_text() if remarks.exists() else "")
        assert text == (PAGES / f"{name}.md").read_text(encoding="utf8")


def test_committed_results_give_the_committed_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = [record for file in task_files(RUNS) for record in read_records(file)]
    reproduce.write_page(every, tmp_path / "papers.md")
    monkeypatch.setattr(study, "LINES", RUNS.parent / "study")
    monkeypatch.setattr(study, "PAGES", tmp_path)
    assert {path.stem for path in study.write_pages()} >= {"study", "study-tables"}
    (tmp_path / "gradual.md").write_text(gradual_page.page(read_records(RUNS / "gradual.jsonl")), encoding="utf8")
    served = serving_page.page(read_records(RUNS.parent / "serving.jsonl"))
    (tmp_path / "serving.md").write_text(served, encoding="utf8")
    report.measured(RUNS.parent, tmp_path)
    written = sorted(tmp_path.glob("*.md"))
    assert {"gradual", "papers", "scale", "speed", "speed-measurements", "latency", "study"} <= {
        p.stem for p in written
    }
    for path in written:
        assert path.read_text(encoding="utf8") == (PAGES / path.name).read_text(encoding="utf8"), path.name


def test_differences_point_to_the_better_side() -> None:
    own, other, _ = (cell for cell in summary.cells(lines()) if cell.method != "tp-growing")
    assert summary.difference(own, other, higher=True).half_width == pytest.approx(0.024841, abs=1e-6)  # type: ignore[union-attr]
    assert summary.difference(own, other, higher=True).mark == "better"  # type: ignore[union-attr]
    assert summary.difference(own, other, higher=False).mark == "worse"  # type: ignore[union-attr]
    alone = summary.cells([line("etp", 0, 0.8), line("torque", 0, 0.1)])
    assert summary.difference(*alone, higher=True) is None
    few = [line("etp", 0, 0.8), line("torque", 0, 0.1), line("depgraph", 1, 0.1)]
    assert "etp against Torque: +70.00, a single seed: `torque`" in task_page.page(few)
    assert "etp against DepGraph: no common seed: `depgraph`" in task_page.page(few)
    more = [*few, line("etp", 1, 0.8), line("torque", 1, 0.2)]
    assert "etp against Torque: +65.00, 2 seeds: `torque`" in task_page.page(more)  # too few for a verdict


def test_report_writes_pages_figures_and_an_index(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "toy.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines()))
    (runs / "toy.md").write_text("It was tried in vain.\n")
    written = report.write(runs, tmp_path / "pages")
    assert [path.name for path in written] == ["toy.md", "evidence.md", "archive.md", "index.md"]
    for name, there in (("toy-curve.png", 0), ("toy-latency.png", 0), ("overview.png", 2)):
        assert (tmp_path / "pages" / "images" / name).stat().st_size > 1000
        assert f"(images/{name})" in written[there].read_text()
    assert "## Remarks\n\nIt was tried in vain.\n" in written[0].read_text()
    assert "+11.00 [+8.52, +13.48], better" in written[2].read_text()


def test_a_task_with_a_single_seed_is_not_in_the_overview(tmp_path: Path) -> None:
    one = [line(method, 0, 0.8) for method in ("etp", "torque")]
    assert plots.plot_overview({"toy": one}, tmp_path) is None
    assert plots.plot_overview({"toy": [*one, line("etp", 1, 0.7)]}, tmp_path) == "overview.png"


def blind(method: str, value: float) -> dict[str, Any]:
    found = line(method, 0, value)
    return {**{k: v for k, v in found.items() if k not in ("test", "latency")}, "val": found["test"]}


def test_the_study_compares_variants_on_the_validation_part() -> None:
    records = [blind("etp", 0.8), blind("etp[uniform]", 0.6), blind("l1-uniform", 0.72)]
    steeper = [copy.deepcopy(blind("etp", 0.5))]
    steeper[0]["config"]["speed_up"] = 6.0
    summary = study.page({"toy": records}, "The force is exponential.")
    assert "## What follows\n\nThe force is exponential.\n" in summary
    assert "| The force | `etp[uniform]` | 1 | +25.0 % |" in summary
    assert "- The force: `etp[uniform]` has the largest loss, +25.0 %." in summary
    assert "- The controls: `l1-uniform` +10.0 %." in summary
    text = study.tables({"toy": records})
    assert "| `etp` | 40.00 / 80.00 | 25.00 / 50.00 | - |" in study.tables({"toy": [*steeper, *records]})
    assert "| `etp` | 40.00 / 80.00 | - |" in text
    assert "| `etp[uniform]` | 30.00 / 60.00 | +25.0 % |" in text  # (80 - 60) / 80
    assert "| `l1-uniform` | 36.00 / 72.00 | +10.0 % |" in text
    assert "etp[rate-8]" not in text  # not run


def test_the_study_keeps_its_lengths_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, pages = tmp_path / "lines", tmp_path / "pages"
    lines.mkdir()
    monkeypatch.setattr(study, "LINES", lines)
    monkeypatch.setattr(study, "PAGES", pages)
    full = blind("etp[hard]", 0.9)
    full["config"]["scale"] = "full"
    (lines / "cora-full.jsonl").write_text(json.dumps({**full}) + "\n")
    (lines / "remarks-full.md").write_text("It holds.\n")
    assert [path.name for path in study.write_pages()] == ["study-full.md", "study-full-tables.md"]
    (lines / "cora.jsonl").write_text(json.dumps(blind("etp-global[uniform]", 0.8)) + "\n")
    assert len(study.write_pages()) == 4
    short, long = ((pages / f"{name}-tables.md").read_text() for name in ("study", "study-full"))
    assert "etp-global[uniform]" in short and "etp[hard]" not in short
    assert "etp[hard]" in long and "uniform]" not in long and "--scale full" in long
    assert "It holds." in (pages / "study-full.md").read_text()


def test_a_variant_with_the_figure_of_etp_counts_as_no_loss() -> None:
    steeper = [blind("etp", 0.5), blind("etp[uniform]", 0.25)]
    for record in steeper:
        record["config"]["speed_up"] = 6.0
    records = [blind("etp", 0.8), blind("etp[uniform]", 0.8), *steeper]
    assert "| The force | `etp[uniform]` | 2 | +25.0 % |" in study.page({"toy": records})  # (0 + 50) / 2


def test_every_variant_differs_from_its_base_and_can_be_run() -> None:
    for name, method in STUDY.items():
        base = GLOBAL if name.startswith(GLOBAL.name) else ETP
        assert contestants.library_method(name) == method
        assert replace(method, name=base.name, source=base.source) != base
        assert method.name == name
