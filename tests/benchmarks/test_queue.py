"""The queue, its locks and its plan; the gate that refuses recipes; how strengths and rates are chosen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.common.records import append_record, read_records
from benchmarks.contest import command, gate, protocol, run, tuning
from benchmarks.contest.ledger import TRIALS, Ledger
from benchmarks.contest.protocol import Config, NotPossibleError, Protocol
from benchmarks.contest.training import train
from benchmarks.contest.tuning import Trial, missing_pushes
from benchmarks.queue import plan, queue, status
from benchmarks.queue.locks import hold_lock, holder
from benchmarks.queue.plan import Experiment, planned_runs
from benchmarks.queue.queue import Job, Queue
from benchmarks.recipes import recipe
from benchmarks.tasks import CONDITIONS, SCALES, TASKS, Metric, Part, Recipe, TaskUnavailableError
from benchmarks.tasks.base import concerns
from etp_graph.errors import BudgetError
from tests.support.models.benchmark_toy import RECIPE, Toy, fields_of

RUNS = Path(__file__).parents[2] / "benchmarks" / "results" / "runs"

FULL = replace(RECIPE, tune_share=1.0, extensions=1)
ACCURACY = {"name": "accuracy", "higher": True, "percent": True}
PERPLEXITY = {"name": "perplexity", "higher": False, "percent": False}
QUIET = Console(quiet=True)


class Gated(Toy):
    """The toy at the scale whose recipes are judged; the control loses what ``lost`` says."""

    lost = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.scale = "full"
        self.recipe = FULL
        self.dense: Any = None

    def evaluate(self, model: Any, part: Part) -> float:
        self.read.append(part)
        self.dense = model if self.dense is None else self.dense
        return 0.9 - (0.0 if model is self.dense else self.lost)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gated:
    task = Gated()
    monkeypatch.setenv("ETP_GRAPH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(TASKS, "toy", lambda scale: task)
    monkeypatch.setattr(protocol, "impossible", lambda task, scale: None)
    monkeypatch.setattr(queue, "WAIT", 0.01)
    return task


def config(method: str, *, speed_up: float = 2.0, seed: int = 0) -> Config:
    return Config(task="toy", scale="full", method=method, speed_up=speed_up, seed=seed)


def experiment(*methods: str, name: str = "X", **changed: Any) -> Experiment:
    settings = {"title": "?", "task": "toy", "methods": methods, "speed_ups": (2.0,), "n_seeds": 1, **changed}
    return Experiment(name=name, **settings)


def done(folder: Path) -> list[tuple[str, int, str]]:
    records = read_records(folder / "toy.jsonl")
    return [(r["config"]["method"], r["config"]["seed"], r["status"]) for r in records]


# The gate.


@pytest.mark.parametrize(
    ("metric", "before", "after", "refused"),
    [
        (ACCURACY, 0.921, 0.9185, False), (ACCURACY, 0.921, 0.9175, True), (ACCURACY, 0.90, 0.95, False),
        (PERPLEXITY, 100.0, 100.9, False), (PERPLEXITY, 100.0, 101.1, True), (PERPLEXITY, 100.0, 50.0, False),
    ],
)  # fmt: skip
def test_a_recipe_is_refused_by_what_its_dense_control_loses(
    metric: dict[str, Any], before: float, after: float, refused: bool
) -> None:
    reason = gate.refusal_of(metric, [(before, after)])
    assert (reason is not None) == refused
    if reason is not None:
        assert "contest recipe" in reason


def test_the_mean_over_the_seeds_decides() -> None:
    assert gate.refusal_of(ACCURACY, [(0.92, 0.916), (0.92, 0.919)]) is None
    assert gate.refusal_of(ACCURACY, [(0.92, 0.916), (0.92, 0.9165)]) is not None
    assert gate.refusal_of(ACCURACY, []) is None


def test_nothing_is_run_under_a_recipe_that_harms_the_control(
    toy: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gated, "lost", 0.004)
    console = Console(record=True, width=300)
    todo = [config("random"), config("etp"), config("dense", speed_up=1.0)]
    assert run.run_all(todo, tmp_path / "toy.jsonl", console=console) == 1
    (record,) = read_records(tmp_path / "toy.jsonl")
    assert (record["config"]["method"], record["status"]) == ("dense", "refused")
    assert record["val"] == {"dense": 0.9, "finetuned": pytest.approx(0.896)}
    assert "test" not in record
    assert "test" not in toy.read  # no figure of a refused recipe needs it
    assert console.export_text().count("not run, the recipe is refused") == 2
    # Another recipe is judged anew.
    toy.recipe, toy.dense = replace(FULL, sparse_rate=0.01), None
    monkeypatch.setattr(Gated, "lost", 0.002)
    assert run.run_all(todo[:1], tmp_path / "toy.jsonl", console=QUIET) == 2
    assert done(tmp_path)[1:] == [("dense", 0, "ok"), ("random", 0, "ok")]


def test_one_seed_more_is_judged_with_those_before(toy: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, lost in enumerate((0.0, 0.005, 0.005)):
        monkeypatch.setattr(Gated, "lost", lost)
        toy.dense = None  # every run has a checkpoint of its own
        run.run_all([config("dense", speed_up=1.0, seed=seed)], tmp_path / "toy.jsonl", console=QUIET)
    # Their means are 0, 0.25 and 0.33 points; alone the second would have been refused.
    assert [status for *_, status in done(tmp_path)] == ["ok", "ok", "refused"]


def test_short_scales_are_not_judged(toy: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gated, "lost", 0.5)
    monkeypatch.setattr(toy, "scale", "smoke")
    todo = [replace(config(method), scale="smoke") for method in ("dense", "random")]
    run.run_all(todo, tmp_path / "toy.jsonl", console=QUIET)
    assert done(tmp_path) == [("dense", 0, "ok"), ("random", 0, "ok")]


# Strengths.


def trials(**values: float | None) -> list[Trial]:
    return [Trial(push=float(name[1:].replace("_", ".")), value=value) for name, value in values.items()]


def test_an_edge_that_wins_is_extended_and_counted() -> None:
    settings = replace(RECIPE, pushes=(0.5, 2.0), extensions=2)
    metric = Metric(name="accuracy")

    def following(**values: float | None) -> list[float]:
        return missing_pushes(trials(**values), settings, "torque", metric)

    assert following() == [0.5, 2.0]
    assert following(p2_0=0.9) == [0.5]
    assert following(p0_5=0.1, p2_0=0.2) == [8.0]
    assert following(p0_5=0.2, p2_0=0.1) == [0.125]
    assert following(p0_5=0.1, p2_0=0.2, p8_0=0.1) == []  # no edge
    assert following(p0_5=0.1, p2_0=0.2, p8_0=0.3) == [32.0]
    assert following(p0_5=0.1, p2_0=0.2, p8_0=0.3, p32_0=0.4) == []  # two extensions are all
    assert following(p0_5=0.1, p2_0=None) == [0.125]  # the strong one diverged
    assert following(p0_5=None, p2_0=None) == []
    assert missing_pushes(trials(p0_5=1.0), replace(settings, pushes=(0.5,)), "torque", metric) == []
    lower = Metric(name="perplexity", higher=False)
    assert missing_pushes(trials(p0_5=1.0, p2_0=2.0), settings, "torque", lower) == [0.125]


def test_a_trial_at_the_full_length_is_as_long_as_a_run() -> None:
    assert FULL.trial() == FULL


@pytest.mark.slow
def test_the_recipes_of_whole_data_sets_are_tuned_at_full_length() -> None:
    for name in TASKS:
        try:
            task = TASKS[name]("full") if name in ("ptb", "cora", "ett", "mrpc") else None
        except TaskUnavailableError:
            continue
        if task is not None:
            assert task.recipe.trial() == task.recipe
            assert len(task.recipe.pushes) == status.GRID
            assert task.recipe.extensions > 0


def test_a_strength_that_is_given_is_not_tuned(toy: Gated, tmp_path: Path) -> None:
    run.run_all([config("torque@0.6"), config("torque@2")], tmp_path / "toy.jsonl", console=QUIET)
    control, weak, strong = read_records(tmp_path / "toy.jsonl")
    assert (control["config"]["method"], weak["push"], strong["push"]) == ("dense", 0.6, 2.0)
    assert strong["strength"] / weak["strength"] == pytest.approx(2 / 0.6)
    assert not weak["trials"]
    assert run.is_known("torque@0.6")
    assert not run.is_known("torque@much")
    assert not run.is_known("torques@0.6")


# Locks.

_HOLD = """
import sys, time
from pathlib import Path
from benchmarks.queue.locks import hold_lock
with hold_lock(Path(sys.argv[1]), "a") as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def test_a_lock_has_one_holder_and_outlives_no_process(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "True"
        assert holder(tmp_path, "a") == other.pid
        with hold_lock(tmp_path, "a") as mine:
            assert not mine
        with hold_lock(tmp_path, "b") as mine:
            assert mine
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        other.stdout.close()
    assert (tmp_path / "a.lock").exists()  # the dead process left it
    assert holder(tmp_path, "a") is None
    with hold_lock(tmp_path, "a") as mine:
        assert mine
        assert holder(tmp_path, "a") == os.getpid()
    assert not list(tmp_path.iterdir())


# The queue.


def test_the_plan_is_worked_off_seed_after_seed(toy: Gated, tmp_path: Path) -> None:
    planned = planned_runs([experiment("random", "no-such-method"), experiment("random", "l1", name="Y", n_seeds=2)])
    console = Console(record=True, width=200)
    assert queue.work_off(Queue(tmp_path, console=console), planned) == "nothing is left to take up"
    methods = [(method, seed) for method, seed, _ in done(tmp_path)]
    assert methods == [("dense", 0), ("random", 0), ("l1", 0), ("dense", 1), ("random", 1), ("l1", 1)]
    assert console.export_text().count("no-such-method is passed over: no such method yet") == 1
    toy.seen.clear()
    assert queue.work_off(Queue(tmp_path, console=QUIET), planned) == "nothing is left to take up"
    assert not toy.seen


def test_a_queue_writes_each_trial_and_stops_in_time(toy: Gated, tmp_path: Path) -> None:
    planned = planned_runs([experiment("torque", n_seeds=2)])
    one = Queue(tmp_path, console=QUIET)
    assert queue.work_off(one, planned, hours=0.0) == "the time is over"
    assert [job.name for job in one.jobs(planned)] == ["toy-full-dense-1-seed-0", "toy-full-dense-1-seed-1"]
    one.work(planned)
    names = [job.name for job in one.jobs(planned)]
    assert names[:2] == ["toy-full-torque-2-trial-0.5", "toy-full-torque-2-trial-2"]
    queue.work_off(one, planned)
    # All trials are alike here, so the weakest is the best: it lies at the edge, and one further follows.
    tried = [line["trial"]["push"] for line in read_records(tmp_path / TRIALS / "toy.jsonl")]
    assert tried == [0.5, 2.0, 0.125]
    runs = [r for r in read_records(tmp_path / "toy.jsonl") if r["config"]["method"] == "torque"]
    assert [r["push"] for r in runs] == [0.125, 0.125]  # tuned once for both seeds
    assert all(len(r["trials"]) == 3 for r in runs)


def test_a_strength_that_is_tuned_at_one_speed_up_serves_all(toy: Gated, tmp_path: Path) -> None:
    toy.recipe = replace(FULL, tuned_at=3.0)
    planned = planned_runs([experiment("torque", speed_ups=(2.0, 3.0))])
    one = Queue(tmp_path, console=QUIET)
    one.work(planned)
    assert {job.name for job in one.jobs(planned)} == {"toy-full-torque-3-trial-0.5", "toy-full-torque-3-trial-2"}
    assert queue.work_off(one, planned) == "nothing is left to take up"
    tried = read_records(tmp_path / TRIALS / "toy.jsonl")
    assert [line["config"]["speed_up"] for line in tried] == [3.0] * 3
    runs = [r for r in read_records(tmp_path / "toy.jsonl") if r["config"]["method"] == "torque"]
    assert [(r["config"]["speed_up"], r["push"], len(r["trials"])) for r in runs] == [(2.0, 0.125, 3), (3.0, 0.125, 3)]
    again = run.run_all([config("torque", speed_up=4.0)], tmp_path / "toy.jsonl", console=QUIET)
    assert again == 1 and len(read_records(tmp_path / TRIALS / "toy.jsonl")) == 3


def test_runs_without_a_strength_for_them_are_passed_over(
    toy: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_reach(*args: Any, **options: Any) -> Any:
        raise NotPossibleError("BudgetError: out of reach")

    toy.recipe = replace(FULL, tuned_at=3.0)
    monkeypatch.setattr(Protocol, "try_push", out_of_reach)
    console = Console(record=True, width=200)
    planned = planned_runs([experiment("torque", "random")])
    assert queue.work_off(Queue(tmp_path, console=console), planned) == "nothing is left to take up"
    assert "torque 2x seed 0 is passed over: its strength is tuned at 3x, not possible" in console.export_text()
    assert ("random", 0, "ok") in done(tmp_path)


def test_two_queues_never_take_the_same_run(toy: Gated, tmp_path: Path) -> None:
    planned = planned_runs([experiment("random", "l1")])
    run.run_all([config("dense", speed_up=1.0)], tmp_path / "toy.jsonl", console=QUIET)
    with hold_lock(tmp_path / queue.LOCKS, Job(config=config("random")).name):  # as another queue does
        one = Queue(tmp_path, console=QUIET)
        assert one.work(planned)
        assert not one.work(planned)
        assert one.is_busy()
        assert [method for method, *_ in done(tmp_path)] == ["dense", "l1"]
    assert not one.is_busy()
    assert one.work(planned)
    assert [method for method, *_ in done(tmp_path)] == ["dense", "l1", "random"]


def test_what_another_queue_finished_a_moment_ago_is_not_repeated(toy: Gated, tmp_path: Path) -> None:
    planned = planned_runs([experiment("random")])
    one, other = (Queue(tmp_path, console=QUIET) for _ in range(2))
    list(one.jobs(planned))  # has read the lines
    queue.work_off(other, planned)
    toy.seen.clear()
    one.work(planned)
    assert not toy.seen
    assert len(done(tmp_path)) == 2


def test_a_refused_recipe_and_a_missing_task_are_passed_over(
    toy: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(scale: str) -> Any:
        raise TaskUnavailableError("no data")

    monkeypatch.setattr(Gated, "lost", 0.004)
    monkeypatch.setitem(TASKS, "elsewhere", unavailable)
    planned = planned_runs([experiment("random", task="elsewhere"), experiment("random", "torque", name="Y")])
    console = Console(record=True, width=300)
    queue.work_off(Queue(tmp_path, console=console), planned)
    assert done(tmp_path) == [("dense", 0, "refused")]
    text = console.export_text()
    assert "elsewhere random is passed over: no data" in text
    assert "toy is passed over, its recipe is refused" in text


def test_another_recipe_is_run_anew(toy: Gated, tmp_path: Path) -> None:
    planned = planned_runs([experiment("random")])
    queue.work_off(Queue(tmp_path, console=QUIET), planned)
    toy.recipe = replace(FULL, finetune_steps=5)
    queue.work_off(Queue(tmp_path, console=QUIET), planned)
    assert [method for method, *_ in done(tmp_path)] == ["dense", "random"] * 2


def test_an_error_of_ours_is_shown_and_stops_no_other_job(
    toy: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Protocol.run

    def broken(self: Protocol, own: Config, **options: Any) -> dict[str, Any]:
        if own.method == "random":
            raise KeyError("ours")
        return original(self, own, **options)

    monkeypatch.setattr(Protocol, "run", broken)
    console = Console(record=True, width=200)
    planned = planned_runs([experiment("random", "l1")])
    assert queue.work_off(Queue(tmp_path, console=console), planned) == "nothing is left to take up"
    assert [method for method, *_ in done(tmp_path)] == ["dense", "l1"]
    assert "KeyError: 'ours'" in console.export_text()


def test_a_trial_that_is_not_possible_gives_the_line_that_says_why(
    toy: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_reach(*args: Any, **options: Any) -> Any:
        raise NotPossibleError("BudgetError: out of reach")

    assert issubclass(BudgetError, Exception)
    monkeypatch.setattr(Protocol, "try_push", out_of_reach)
    queue.work_off(Queue(tmp_path, console=QUIET), planned_runs([experiment("torque")]))
    assert done(tmp_path) == [("dense", 0, "ok"), ("torque", 0, "not possible")]


# The plan and its status.


def test_the_plan_names_tasks_and_methods_that_are_known_or_agreed() -> None:
    agreed = {
        "etp-hard", "etp-uniform-force", "l1-gradual", "taylor-gradual", "taylor-gradual+kd", "torque-published",
        "tp-groupnorm-local", "index-uniform", "index-linear", "index-base", "index-exponential",
    }  # fmt: skip
    for each in plan.PLAN:
        assert each.task in {**TASKS, **CONDITIONS}
        assert each.scale in SCALES
        assert all(run.is_known(name) or name.partition("@")[0] in agreed for name in each.methods)
    configs = [each.config for each in planned_runs(plan.PLAN)]
    assert len({own.key for own in configs}) == len(configs)
    first = {own.task: own.method for own in reversed(configs)}
    assert set(first.values()) == {"dense"}  # which judges the recipe of each task


def test_status_counts_what_is_done_and_left(toy: Gated, tmp_path: Path) -> None:
    own = experiment("random", "torque", "no-such-method", n_seeds=2)
    planned = planned_runs([own])
    before = status.progress_of(own, planned, tmp_path, estimate=False)
    assert (before.done, before.missing, before.unknown, before.trials) == (0, 6, 2, status.GRID)
    assert before.hours_left is None
    run.run_all([config("dense", speed_up=1.0), config("random")], tmp_path / "toy.jsonl", console=QUIET)
    with hold_lock(tmp_path / queue.LOCKS, Job(config=config("torque"), push=0.5).name):
        after = status.progress_of(own, planned, tmp_path, estimate=False)
    assert (after.done, after.running, after.missing, after.trials) == (2, 1, 4, status.GRID)
    assert after.measured
    records = read_records(tmp_path / "toy.jsonl")
    mean = sum(record["seconds"] for record in records) / 2
    assert after.hours_left == pytest.approx((4 + status.GRID) * mean / 3600)
    assert status.progress_of(own, planned, tmp_path / "none", estimate=True).seconds > 0  # type: ignore[operator]
    console = Console(record=True, width=160)
    console.print(status.table([(own, after)]))
    assert "X" in console.export_text()


def test_the_commands_list_and_show_without_running(
    toy: Gated, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command.main(["queue", "--list", "--experiments", "E4", "--out", str(tmp_path)])
    assert "E4: ptb dense 1x seed 2" in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "160")
    command.main(["status", "--tasks", "ptb", "--no-estimate", "--out", str(tmp_path)])
    assert "ptb" in capsys.readouterr().out
    for mode in command.MODES:
        with pytest.raises(SystemExit, match="0"):
            command.main([mode, "--help"])
        assert f"usage: python -m benchmarks contest {mode} " in capsys.readouterr().out


# The rate of a recipe.


def test_the_rate_is_chosen_by_the_control_and_each_is_tried_once(
    toy: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = {0.02: 0.90, 0.01: 0.92, 0.005: 0.91}
    tried: list[tuple[float, str]] = []

    def try_push(self: Protocol, own: Config, push: float) -> Trial:
        assert (own.method, own.seed) == ("dense", protocol.TUNING_SEED)
        settings = self.task.recipe
        assert settings.sparse_rate == settings.finetune_rate == push
        tried.append((push, settings.precision))
        return Trial(push=push, value=best[push], seconds=1.0)

    monkeypatch.setattr(Protocol, "try_push", try_push)
    precisions: Sequence[Any] = ["bf16", "fp32"]
    lines = recipe.search(Protocol(toy), list(best), precisions, tmp_path / "toy.jsonl", console=QUIET)
    assert tried == [(0.02, "bf16"), (0.01, "bf16"), (0.005, "bf16"), (0.01, "fp32")]
    assert lines[0]["lost"] == pytest.approx(0.0)
    assert set(toy.read) == {"val"}
    toy.recipe = FULL
    recipe.search(Protocol(toy), list(best), precisions, tmp_path / "toy.jsonl", console=QUIET)
    assert len(tried) == 4
    console = Console(record=True, width=160)
    console.print(recipe.table(lines))
    assert "92.00*" in console.export_text()


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((RUNS / recipe.RECIPES).glob("*.jsonl")), ids=lambda file: file.stem)
def test_the_rate_of_a_recipe_is_the_best_of_its_lines(file: Path) -> None:
    lines = [line for line in read_records(file) if line["scale"] == "full"]
    best = recipe.best_line(lines, higher=lines[0]["metric"]["higher"])
    assert best is not None
    own = TASKS[file.stem]("full").recipe
    assert own.sparse_rate == own.finetune_rate == best["recipe"]["sparse_rate"]
    assert own.precision == "fp32" or recipe.find(lines, replace(own, precision="fp32")) is not None


@pytest.mark.parametrize(("instructions", "half"), [("AVX512", torch.bfloat16), ("AVX2", torch.float32)])
def test_half_precision_is_that_of_the_forward_alone_where_it_is_not_emulated(
    toy: Gated, monkeypatch: pytest.MonkeyPatch, instructions: str, half: torch.dtype
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    seen: list[torch.dtype] = []
    model = toy.build()
    model.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    train(toy, model, steps=1, peak=0.01, seed=0, start=0)
    toy.recipe = replace(FULL, precision="bf16")
    train(toy, model, steps=1, peak=0.01, seed=0, start=0)
    assert seen == [torch.float32, half]
    assert all(p.dtype == torch.float32 for p in model.parameters())


# Lines.


def test_lines_from_before_a_setting_existed_have_its_default() -> None:
    now = json.loads(json.dumps(fields_of(RECIPE)))
    old = {name: value for name, value in now.items() if name not in ("extensions", "precision")}
    assert concerns(old, "etp") == concerns(now, "etp")
    assert concerns({**old, "precision": "bf16"}, "etp") != concerns(now, "etp")


def test_lines_of_the_former_name_of_a_scale_are_read(tmp_path: Path) -> None:
    file = tmp_path / "sst2.jsonl"
    for task in ("sst2", "cifar10"):
        append_record(file, {"config": {"task": task, "scale": "paper"}})
    assert [record["config"]["scale"] for record in read_records(file)] == ["full", "paper"]


def test_trials_of_another_recipe_or_speed_up_do_not_count(tmp_path: Path) -> None:
    book = Ledger(tmp_path / "toy.jsonl")
    book.write_trial(config("torque"), FULL, Trial(push=0.5, value=0.9, seconds=2.0))
    for ledger in (book, Ledger(tmp_path / "toy.jsonl")):
        assert ledger.trials(config("torque", seed=3), FULL) == [Trial(push=0.5, value=0.9, seconds=2.0)]
        assert not ledger.trials(config("torque", speed_up=4.0), FULL)
        assert not ledger.trials(config("depgraph"), FULL)
        assert not ledger.trials(config("torque"), replace(FULL, sparse_steps=99))
    settings: Recipe = replace(FULL, pushes=(0.5, 2.0))
    assert tuning.grid(settings, "small-dense") != settings.pushes
